"""The grids of the levels, and the nested order of their cells.

Level 0 is the finest. Every level's grid is an integer multiple of the next one's, so a cell has
one ancestor at every coarser level. In *nested order* the cells that share an ancestor are next to
each other, at every level. A tensor over level ℓ's cells can then be viewed as (cells of level k,
descendants of each, …) without a copy, and a run of coarsest cells with their descendants is a
slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

MAX_RUN_ELEMENTS = 2**19  # of patches per CPU thread: 2 MiB in float32, which fit the cache


@dataclass(frozen=True)
class PatchGrid:
    """The cells and channels of each level, finest first.

    Attributes:
        grids: (height, width) of each level.
        channels: c_ℓ, the number of kept channels of each level.

    Raises:
        ValueError: if a grid is not an integer multiple of the next.
    """

    grids: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.grids or len(self.grids) != len(self.channels):
            raise ValueError(f"{len(self.grids)} grids for {len(self.channels)} levels of channels")
        for fine, coarse in pairwise(self.grids):
            if fine[0] % coarse[0] or fine[1] % coarse[1]:
                raise ValueError(f"grid {fine} is not an integer multiple of the next, {coarse}")

    @property
    def levels(self) -> int:
        return len(self.grids)

    @property
    def cells(self) -> tuple[int, ...]:
        """P_ℓ, the number of cells of each level."""
        return tuple(height * width for height, width in self.grids)

    @cached_property
    def orders(self) -> tuple[torch.Tensor, ...]:
        """Per level, the raster indices of the cells in nested order, (P_ℓ,) int64."""
        return tuple(torch.from_numpy(self._order(level)) for level in range(self.levels))

    def _order(self, level: int) -> np.ndarray:
        height, width = self.grids[level]
        y, x = np.divmod(np.arange(height * width), width)
        ancestors = [
            (y * h // height) * w + x * w // width for h, w in self.grids[level:]
        ]  # finest first, since lexsort's primary key is the last: the coarsest
        return np.lexsort(ancestors)

    def empty(
        self,
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        widths: Sequence[int] | None = None,
    ) -> "Embeddings":
        """Uninitialised embeddings of `images` images.

        Args:
            widths: allocated channels per level, see `Trunk.widths`. Default: the grid's channels.
        """
        shapes = zip(self.cells, widths or self.channels, strict=True)
        return Embeddings(
            tuple(torch.empty(images, *shape, dtype=dtype, device=device) for shape in shapes),
            self.channels,
        )

    def nest(
        self, features: Sequence[torch.Tensor], out: "Embeddings | None" = None
    ) -> "Embeddings":
        """Embeddings from feature maps (B, c_ℓ, H_ℓ, W_ℓ) of each level.

        Args:
            out: embeddings to write to, of the same shape. Default: new ones.
        """
        device = features[0].device
        widths = [maps.shape[1] for maps in features]
        out = out or self.empty(len(features[0]), features[0].dtype, device, widths)
        for maps, order, level in zip(features, orders_on(self, device), out.levels, strict=True):
            rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
            if rows.is_cuda and rows.is_contiguous() and rows.shape[2] % 4 == 0:
                # a GPU copies one element per thread: four features at once are faster
                rows, level = rows.view(torch.int64), level.view(torch.int64)
            torch.index_select(rows, 1, order, out=level)
        return out

    def unnest(self, values: torch.Tensor) -> torch.Tensor:
        """Images from level 0's values in nested order: (P_0, B) → (B, H_0, W_0)."""
        raster = torch.empty_like(values)
        raster[orders_on(self, values.device)[0]] = values
        return raster.T.reshape(-1, *self.grids[0])


@lru_cache(maxsize=16)
def orders_on(grid: PatchGrid, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The grid's `orders` on a device, cached."""
    return tuple(order.to(device) for order in grid.orders)


@dataclass(frozen=True)
class Embeddings:
    """The features of a batch of images at all cells.

    Attributes:
        levels: per level (B, P_ℓ, c_ℓ), finest first, cells in nested order. On GPUs the last
            dimension may be longer, see `Trunk.widths`.
        channels: c_ℓ of each level; features after the first c_ℓ are padding.
    """

    levels: tuple[torch.Tensor, ...]
    channels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, images: torch.Tensor | slice) -> "Embeddings":
        """The embeddings of some of the images."""
        return Embeddings(tuple(level[images] for level in self.levels), self.channels)

    def to(self, device: torch.device | str) -> "Embeddings":
        """Copy to a device; features that are already there are not copied."""
        return Embeddings(tuple(level.to(device) for level in self.levels), self.channels)

    def unpadded(self) -> list[torch.Tensor]:
        """Per level (B, P_ℓ, c_ℓ), contiguous."""
        pairs = zip(self.levels, self.channels, strict=True)
        return [level[..., :channels].contiguous() for level, channels in pairs]

    def split(self, images: int) -> list["Embeddings"]:
        """Split into views of at most `images` images each."""
        parts = (level.split(images) for level in self.levels)
        return [Embeddings(part, self.channels) for part in zip(*parts, strict=True)]

    def are_bfloat16_on(self, is_suitable: Callable[[torch.device], bool]) -> bool:
        """Whether the features are bfloat16 and on a device that `is_suitable`."""
        level = self.levels[0]
        return level.dtype == torch.bfloat16 and is_suitable(level.device)

    def are_finite(self) -> torch.Tensor:
        """Whether all features of each image are finite, (B,) bool."""
        products = []
        for level in self.levels:
            rows = level.flatten(1)
            # NaN or infinity times zero is NaN; a product is 20 times as fast as isfinite
            products.append(rows @ rows.new_zeros(rows.shape[1]))
        return torch.stack(products).isfinite().all(0)

    def patches(self, start: int = 0, stop: int | None = None) -> list[torch.Tensor]:
        """The features with images last: per level (P_ℓ, c_ℓ, B) float32.

        Args:
            start: with `stop`, the run of coarsest cells that is returned with its descendants.
            stop: default: the number of coarsest cells.
        """
        coarsest = self.levels[-1].shape[1]
        stop = coarsest if stop is None else stop
        patches = []
        for level, channels in zip(self.levels, self.channels, strict=True):
            images, cells, _ = level.shape
            run = level[:, start * cells // coarsest : stop * cells // coarsest, :channels]
            # PyTorch transposes in blocks from contiguous to contiguous memory, which is faster
            rows = run.contiguous().view(images, run.shape[1] * channels).T.contiguous()
            patches.append(rows.float().view(run.shape[1], channels, images))
        return patches

    def runs(self) -> list[tuple[int, int]]:
        """Runs of coarsest cells whose patches fit the CPU's cache; on GPUs, one run of all."""
        elements = sum(level.numel() for level in self.levels)
        if self.levels[0].is_cuda:
            return [(0, self.levels[-1].shape[1])]
        run_elements = MAX_RUN_ELEMENTS * torch.get_num_threads()
        return split_cells(self.levels[-1].shape[1], -(-elements // run_elements))


def split_cells(coarsest_cells: int, parts: int) -> list[tuple[int, int]]:
    """Split the coarsest cells into at most `parts` runs [start, stop) of nearly equal length."""
    parts = max(1, min(parts, coarsest_cells))
    bounds = np.linspace(0, coarsest_cells, parts + 1).round().astype(int).tolist()
    return list(pairwise(bounds))
