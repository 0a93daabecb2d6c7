"""Search: measure a cell against the parameters of the cells around it, and take the least."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from padim_ray.features.grid import PatchGrid


@lru_cache(maxsize=16)
def cells_around(grid: PatchGrid, radius: int) -> torch.Tensor:
    """The cells of the finest grid at most `radius` rows and columns away from each, with itself.

    Returns:
        (P_0, (2·radius + 1)²) int64: both in nested order, -1 beyond the border.
    """
    height, width = grid.grids[0]
    raster = grid.orders[0].numpy()
    nested = np.empty_like(raster)
    nested[raster] = np.arange(len(raster))
    padded = np.full((height + 2 * radius, width + 2 * radius), -1)
    padded[radius : radius + height, radius : radius + width] = nested.reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * (2 * radius + 1,))
    return torch.from_numpy(windows.reshape(height * width, -1)[raster].copy())


def most_distant_after_search(
    distances: torch.Tensor,
    count: int,
    search: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Each image's `count` greatest distances after search, without searching everywhere.

    Search only lowers distances. So cells are searched from the most distant one on, until the next
    one's own distance is no greater than the `count`-th greatest found.

    Args:
        distances: before search, (B, P_0).
        count: at most P_0.
        search: the searched distances (N,) of images (N,) and cells (N,).

    Returns:
        (B, count), in no particular order.
    """
    images, cells = distances.shape
    ordered, order = distances.sort(1, descending=True)
    found = torch.full_like(distances, -torch.inf)  # in that order
    start, stop = 0, min(2 * count, cells)
    unfinished = torch.arange(images, device=distances.device)
    while len(unfinished):
        rows = unfinished.repeat_interleave(stop - start)
        columns = torch.arange(start, stop, device=rows.device).repeat(len(unfinished))
        found[rows, columns] = search(rows, order[rows, columns])
        if stop == cells:
            break
        least = found[unfinished].topk(count, sorted=True).values[:, -1]
        unfinished = unfinished[ordered[unfinished, stop] > least]
        start, stop = stop, min(2 * stop, cells)
    return found.topk(count, sorted=False).values
