"""Anomaly maps: patch distances, upsampled bilinearly and smoothed by a Gaussian.

Everything here takes NumPy arrays and tensors. It doesn't import torch, which the tasks that draw
and write can do without.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class AnomalyMapper:
    """Turns patch distances into anomaly maps (PaDiM, section 4.2).

    `patches`: height and width of the patch grid. `size`: height and width of the model's input in
    pixels. `sigma`: standard deviation of the smoothing Gaussian in pixels; 0 disables smoothing.

    Upsampling and smoothing are linear and separable, so one matrix per axis does both, without
    intermediate images.
    """

    patches: tuple[int, int]
    size: tuple[int, int]
    sigma: float = 4.0

    def maps(self, distances: Array) -> Array:
        """Distances (B, *patches) → anomaly maps (B, *size), of the same type and dtype."""
        rows, columns = (
            _like(_upsample_and_smooth(patches, pixels, self.sigma), distances)
            for patches, pixels in zip(self.patches, self.size, strict=True)
        )
        return rows @ distances @ columns.T


def image_scores(distances: "torch.Tensor", maps: "torch.Tensor", share: float) -> "torch.Tensor":
    """The image's scores (B,).

    Args:
        distances: at the cells, (B, H, W).
        maps: the anomaly maps, (B, height, width).
        share: share of the cells, the most distant ones, whose mean is the score; at least one
            cell. 0: the score is the map's maximum, as in the paper.
    """
    if not share:
        return maps.amax((1, 2))
    cells = distances.flatten(1)
    return cells.topk(cells_of_share(share, cells.shape[1]), sorted=False).values.mean(1)


def cells_of_share(share: float, cells: int) -> int:
    """The number of cells whose mean distance is an image's score."""
    return max(1, round(share * cells))


def _like(matrix: np.ndarray, array: Array) -> Array:
    if isinstance(array, np.ndarray):
        return matrix.astype(array.dtype)
    return array.new_tensor(matrix)


@lru_cache(maxsize=16)
def _upsample_and_smooth(cells: int, pixels: int, sigma: float) -> np.ndarray:
    """The matrix (pixels, cells), float64, that upsamples and smooths along one axis.

    Bilinear upsampling puts pixel centres at half-integers (`align_corners=False`). The Gaussian is
    sampled, truncated at 4σ and reflected at the borders without repeating the border pixel
    (SciPy's mode "mirror").
    """
    position = ((np.arange(pixels) + 0.5) * cells / pixels - 0.5).clip(0, cells - 1)
    below = position.astype(int).clip(max=max(cells - 2, 0))
    share = position - below
    matrix = np.zeros((pixels, cells))
    matrix[np.arange(pixels), below] = 1 - share
    matrix[np.arange(pixels), np.minimum(below + 1, cells - 1)] += share
    return _smoothing(pixels, sigma) @ matrix if sigma > 0 else matrix


def _smoothing(pixels: int, sigma: float) -> np.ndarray:
    """The matrix (pixels, pixels) of the Gaussian alone."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    period = max(2 * (pixels - 1), 1)
    source = (np.arange(pixels)[:, None] + offsets) % period
    source = np.minimum(source, period - source)
    matrix = np.zeros((pixels, pixels))
    np.add.at(matrix, (np.arange(pixels)[:, None], source), weights)
    return matrix
