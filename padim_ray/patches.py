"""The levels' grids and the nested order of their cells.

Level 0 is the finest. Every level's grid is an integer multiple of the next one's, so a cell has
one ancestor at every coarser level. In *nested order* the cells that share an ancestor lie next to
each other, at every level: a tensor over level ℓ's cells can then be viewed as
(cells of level k, descendants of each, …) without a copy, and a run of coarsest cells with all
their descendants is a slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch


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

    @property
    def state_size(self) -> int:
        """Numbers in this grid's scatters or whitenings, unpacked."""
        coarser_and_own = [sum(self.channels[level:]) for level in range(self.levels)]
        return sum(
            p * c * d for p, c, d in zip(self.cells, self.channels, coarser_and_own, strict=True)
        )

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

    def nest(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Feature maps as nested cells: (B, c_ℓ, H_ℓ, W_ℓ) → (P_ℓ, c_ℓ, B) float32 per level."""
        return [
            _nest(maps, order.to(maps.device))
            for maps, order in zip(features, self.orders, strict=True)
        ]

    def unnest(self, values: torch.Tensor) -> torch.Tensor:
        """Level 0's values in nested order as images: (P_0, B) → (B, H_0, W_0)."""
        raster = torch.empty_like(values)
        raster[self.orders[0].to(values.device)] = values
        return raster.T.reshape(-1, *self.grids[0])


def _nest(maps: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = maps.shape
    cells = height * width
    rows = maps.permute(0, 2, 3, 1).reshape(batch, cells, channels)  # free for channels-last maps
    rows = rows.index_select(1, order).float()
    return rows.view(batch, cells * channels).T.contiguous().view(cells, channels, batch)


def split_cells(coarsest_cells: int, parts: int) -> list[tuple[int, int]]:
    """Split the coarsest cells into at most `parts` runs [start, stop) of nearly equal length."""
    parts = max(1, min(parts, coarsest_cells))
    bounds = np.linspace(0, coarsest_cells, parts + 1).round().astype(int).tolist()
    return list(pairwise(bounds))
