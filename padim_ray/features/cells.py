"""Average feature maps over cells, before a density models them.

PaDiM models every position of the finest level by itself. Here a cell may be larger: a level that
is finer than the cell is averaged over it, and one that is coarser keeps its own positions. A
neighbourhood is averaged first, on each level's own grid; Roth et al. (2022) call such features
locally aware. Both are linear, so statistics of cells stay exact and mergeable.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import avg_pool2d

from padim_ray.errors import ModelError
from padim_ray.features import gpu

MAX_STRIDE = 1024  # pixels
MAX_NEIGHBOURHOOD = 31  # positions


def cell_grids(
    size: tuple[int, int], strides: Sequence[int], stride: int
) -> tuple[tuple[int, int], ...]:
    """Height and width, in cells, of each level.

    Args:
        size: height and width of the model's input, in pixels.
        strides: of the levels, finest first; each is a multiple of the one before.
        stride: the side of a cell, in pixels.

    Raises:
        ModelError: if the cell doesn't fit the levels, or the input isn't a multiple of the largest
            cell; names the nearest numbers that do.
    """
    if not _fits(stride, strides):
        nearest = _nearest(stride, strides)
        raise ModelError(
            f"A cell of {stride} pixels neither divides the layers' strides "
            f"({', '.join(map(str, strides))}) nor is a multiple of them; use {nearest}"
        )
    largest = max(stride, *strides)
    for pixels in size:
        if pixels % largest:
            below, above = pixels // largest * largest, (pixels // largest + 1) * largest
            nearest = f"{below} or {above}" if below else str(above)
            what = "the deepest layer's stride" if largest == max(strides) else "the cells' stride"
            raise ModelError(
                f"The input size {size[0]}×{size[1]} is not a multiple of {largest}, {what}; "
                f"instead of {pixels} use {nearest}"
            )
    sides = [max(stride, own) for own in strides]
    return tuple((size[0] // side, size[1] // side) for side in sides)


def _fits(stride: int, strides: Sequence[int]) -> bool:
    return stride > 0 and all(stride % own == 0 or own % stride == 0 for own in strides)


def _nearest(stride: int, strides: Sequence[int]) -> str:
    valid = [other for other in range(1, MAX_STRIDE + 1) if _fits(other, strides)]
    below = [other for other in valid if other < stride][-1:]
    above = [other for other in valid if other > stride][:1]
    return " or ".join(map(str, below + above))


def average_cells(
    features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]], neighbourhood: int
) -> list[torch.Tensor]:
    """Average each level over neighbourhoods, and then over cells.

    Args:
        features: feature maps (B, c_ℓ, h_ℓ, w_ℓ) of each level, channels-last.
        grids: (H_ℓ, W_ℓ) of each level's cells, which divide (h_ℓ, w_ℓ) by the same number.
        neighbourhood: side of the square of positions that is averaged around each position, odd.
            At the borders the average is over the positions that are there.

    Returns:
        (B, c_ℓ, H_ℓ, W_ℓ) for each level, in the features' type.
    """
    return [
        _average(maps, maps.shape[2] // height, neighbourhood)
        for maps, (height, _) in zip(features, grids, strict=True)
    ]


def _average(maps: torch.Tensor, positions: int, neighbourhood: int) -> torch.Tensor:
    if positions == neighbourhood == 1:
        return maps
    if gpu.has_kernels(maps.device):
        from padim_ray.features import kernels

        return kernels.average(maps, positions, neighbourhood)
    if neighbourhood > 1:
        reach = neighbourhood // 2
        maps = avg_pool2d(maps, neighbourhood, 1, reach, count_include_pad=False)
    return avg_pool2d(maps, positions) if positions > 1 else maps
