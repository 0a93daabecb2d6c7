"""Random feature maps like a trunk's: not negative, correlated, with variances 0.01 to 0.1."""

import numpy as np
import torch
from hypothesis import strategies as st

from padim_ray.features.grid import PatchGrid

SHAPES = [
    (((6, 8),), (5,)),
    (((4, 4),), (12,)),
    (((8, 12), (4, 6)), (5, 7)),
    (((6, 6), (2, 2)), (4, 9)),
    (((8, 8), (4, 4), (2, 2)), (3, 5, 9)),
    (((16, 8), (8, 4), (4, 2)), (6, 2, 4)),
    (((8, 8), (4, 4), (1, 1)), (1, 8, 3)),
]


@st.composite
def grids(draw) -> PatchGrid:
    """Draw a grid of one to three levels."""
    return PatchGrid(*draw(st.sampled_from(SHAPES)))


def random_features(grid: PatchGrid, images: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random features: per level (images, c_ℓ, H_ℓ, W_ℓ) float32."""
    levels = []
    for (height, width), channels in zip(grid.grids, grid.channels, strict=True):
        mixing = rng.normal(0, 0.25 / max(channels, 1) ** 0.5, (channels, channels))
        noise = rng.normal(size=(images, height, width, channels)) @ mixing
        mean = rng.exponential(0.7, (height, width, channels))
        levels.append(np.maximum(mean + noise, 0).transpose(0, 3, 1, 2).astype(np.float32))
    return levels


def nest(grid: PatchGrid, features: list[np.ndarray]) -> list[torch.Tensor]:
    """Convert feature maps to patches in nested order."""
    return grid.nest([torch.from_numpy(level) for level in features]).patches()
