"""The levels' grids and the nested order of their cells.

Level 0 is the finest. Every level's grid is an integer multiple of the next one's, so a cell has
one ancestor at every coarser level. In *nested order* the cells that share an ancestor lie next to
each other, at every level: a tensor over level ℓ's cells can then be viewed as
(cells of level k, descendants of each, …) without a copy, and a run of coarsest cells with all
their descendants is a slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

RUN_NUMBERS = 2**19  # of patches that each of the CPU's threads works on: 2 MiB in float32


@dataclass(frozen=True)
class PatchGrid:
    """Grid (height, width) and number of kept channels of each level, finest first."""

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
        """Number of cells of each level."""
        return tuple(height * width for height, width in self.grids)

    @cached_property
    def orders(self) -> tuple[torch.Tensor, ...]:
        """Per level, the raster index of each cell in nested order, (P_ℓ,) int64."""
        return tuple(torch.from_numpy(self._order(level)) for level in range(self.levels))

    def _order(self, level: int) -> np.ndarray:
        height, width = self.grids[level]
        y, x = np.divmod(np.arange(height * width), width)
        ancestors = [
            (y * h // height) * w + x * w // width for h, w in self.grids[level:]
        ]  # own cell first; lexsort's last key is the primary one: the coarsest
        return np.lexsort(ancestors)

    def empty(
        self,
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        widths: Sequence[int] | None = None,
    ) -> "Embeddings":
        """Room for so many images' features; `widths`: as `Trunk` gives them."""
        shapes = zip(self.cells, widths or self.channels, strict=True)
        return Embeddings(
            tuple(torch.empty(images, *shape, dtype=dtype, device=device) for shape in shapes),
            self.channels,
        )

    def nest(
        self, features: Sequence[torch.Tensor], out: "Embeddings | None" = None
    ) -> "Embeddings":
        """Feature maps (B, c_ℓ, H_ℓ, W_ℓ) per level, as cells in nested order."""
        device = features[0].device
        widths = [maps.shape[1] for maps in features]
        out = out or self.empty(len(features[0]), features[0].dtype, device, widths)
        for maps, order, level in zip(features, orders_on(self, device), out.levels, strict=True):
            rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
            if rows.is_cuda and rows.is_contiguous() and rows.shape[2] % 4 == 0:
                # GPUs copy numbers, not bytes: the wider, the faster
                rows, level = rows.view(torch.int64), level.view(torch.int64)
            torch.index_select(rows, 1, order, out=level)
        return out

    def unnest(self, values: torch.Tensor) -> torch.Tensor:
        """Level 0's values in nested order as images: (P_0, B) → (B, H_0, W_0)."""
        raster = torch.empty_like(values)
        raster[orders_on(self, values.device)[0]] = values
        return raster.T.reshape(-1, *self.grids[0])


@lru_cache(maxsize=16)
def orders_on(grid: PatchGrid, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The grid's `orders`, on a device."""
    return tuple(order.to(device) for order in grid.orders)


@dataclass(frozen=True)
class Embeddings:
    """Images' features at all cells, in nested order: per level (B, P_ℓ, c_ℓ), finest first.

    On GPUs the last dimension may be longer, see `Trunk`: only its first `channels` are features.
    """

    levels: tuple[torch.Tensor, ...]
    channels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, images: torch.Tensor | slice) -> "Embeddings":
        """Those of some images."""
        return Embeddings(tuple(level[images] for level in self.levels), self.channels)

    def split(self, images: int) -> list["Embeddings"]:
        """Views of so many images each."""
        parts = (level.split(images) for level in self.levels)
        return [Embeddings(part, self.channels) for part in zip(*parts, strict=True)]

    def are_bfloat16_on(self, is_suitable: Callable[[torch.device], bool]) -> bool:
        """Whether they are bfloat16 on a device of that kind."""
        level = self.levels[0]
        return level.dtype == torch.bfloat16 and is_suitable(level.device)

    def are_finite(self) -> torch.Tensor:
        """Which images' features are all finite: (B,) bool."""
        products = []
        for level in self.levels:
            rows = level.flatten(1)
            # infinity times zero is NaN, too; a product is 20 times as fast as isfinite
            products.append(rows @ rows.new_zeros(rows.shape[1]))
        return torch.stack(products).isfinite().all(0)

    def patches(self, start: int = 0, stop: int | None = None) -> list[torch.Tensor]:
        """Of the coarsest cells [start, stop) and their descendants, (P_ℓ, c_ℓ, B) float32."""
        coarsest = self.levels[-1].shape[1]
        stop = coarsest if stop is None else stop
        patches = []
        for level, channels in zip(self.levels, self.channels, strict=True):
            images, cells, _ = level.shape
            run = level[:, start * cells // coarsest : stop * cells // coarsest, :channels]
            # from contiguous to contiguous, the transposition is done in blocks
            rows = run.contiguous().view(images, run.shape[1] * channels).T.contiguous()
            patches.append(rows.float().view(run.shape[1], channels, images))
        return patches

    def runs(self) -> list[tuple[int, int]]:
        """Runs of coarsest cells whose patches are worked on while they are in the cache."""
        numbers = sum(level.numel() for level in self.levels)
        if self.levels[0].is_cuda:
            return [(0, self.levels[-1].shape[1])]
        together = RUN_NUMBERS * torch.get_num_threads()
        return split_cells(self.levels[-1].shape[1], -(-numbers // together))


def split_cells(coarsest_cells: int, parts: int) -> list[tuple[int, int]]:
    """Split the coarsest cells into at most `parts` runs [start, stop) of nearly equal length."""
    parts = max(1, min(parts, coarsest_cells))
    bounds = np.linspace(0, coarsest_cells, parts + 1).round().astype(int).tolist()
    return list(pairwise(bounds))
