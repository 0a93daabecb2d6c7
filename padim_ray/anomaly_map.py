"""Anomaly maps: distances upsampled bilinearly, smoothed by a Gaussian, and their maximum."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def anomaly_maps(
    distances: torch.Tensor, size: tuple[int, int], *, sigma: float = 4.0
) -> torch.Tensor:
    """Upsample patch distances to the input size and smooth them (PaDiM, section 4.2).

    Args:
        distances: (B, H, W) Mahalanobis distances of the patches.
        size: height and width of the model's input, in pixels.
        sigma: the Gaussian's standard deviation in pixels; 0 doesn't smooth.

    Returns:
        (B, height, width), in the type of `distances`.

    Both steps are linear and separable, so together they are one matrix per axis, applied as
    matrix products: the same map as upsampling and then smoothing, without its intermediate images.
    """
    rows, columns = (
        _upsample_and_smooth(cells, pixels, sigma).to(distances)
        for cells, pixels in zip(distances.shape[1:], size, strict=True)
    )
    return rows @ distances @ columns.T


def image_scores(maps: torch.Tensor) -> torch.Tensor:
    """Each map's maximum: (B, height, width) → (B,)."""
    return maps.amax((1, 2))


@lru_cache(maxsize=16)
def _upsample_and_smooth(cells: int, pixels: int, sigma: float) -> torch.Tensor:
    """The matrix (pixels, cells) of bilinear upsampling followed by smoothing along one axis."""
    basis = torch.eye(cells, dtype=torch.float64)[:, None]
    upsampled = F.interpolate(basis, pixels, mode="linear", align_corners=False)[:, 0]
    if sigma > 0:
        upsampled = upsampled @ _smoothing(pixels, sigma).T
    return upsampled.T.contiguous()


def _smoothing(pixels: int, sigma: float) -> torch.Tensor:
    """The matrix (pixels, pixels) of a sampled Gaussian cut at 4σ, reflecting at the borders."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    period = max(2 * (pixels - 1), 1)
    source = (torch.arange(pixels)[:, None] + offsets).remainder(period)
    source = torch.minimum(source, period - source)
    return torch.zeros(pixels, pixels, dtype=torch.float64).scatter_add_(
        1, source, weights.expand(pixels, -1)
    )
