"""PaDiM as the paper writes it, dense and in float64: the reference for the nested blocks."""

import numpy as np


def averaged(maps: np.ndarray, rows: int, columns: int, neighbourhood: int) -> np.ndarray:
    """Average (B, c, h, w) over neighbourhoods and then cells, position by position: float64."""
    height, width = maps.shape[2:]
    reach = neighbourhood // 2
    around = np.empty(maps.shape)
    for y, x in np.ndindex(height, width):
        window = maps[:, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        around[:, :, y, x] = window.mean((2, 3), dtype=np.float64)
    cells = np.empty((*maps.shape[:2], rows, columns))
    for row, column in np.ndindex(rows, columns):
        down, across = height // rows, width // columns
        part = around[:, :, row * down : (row + 1) * down, column * across : (column + 1) * across]
        cells[:, :, row, column] = part.mean((2, 3))
    return cells


def embeddings(features: list[np.ndarray]) -> np.ndarray:
    """Concatenate levels (B, c_ℓ, H_ℓ, W_ℓ), nearest neighbour: (H_0, W_0, B, Σc_ℓ) float64."""
    height, width = features[0].shape[2:]
    repeated = [
        level.astype(np.float64)
        .repeat(height // level.shape[2], axis=2)
        .repeat(width // level.shape[3], axis=3)
        for level in features
    ]
    return np.concatenate(repeated, axis=1).transpose(2, 3, 0, 1)


def covariances(fitted: np.ndarray, channels: list[int], kind: str) -> np.ndarray:
    """Regularised covariance at every patch, (H, W, D, D), with the default constants."""
    count = fitted.shape[2]
    offset = fitted - fitted.mean(2, keepdims=True)
    scatter = np.einsum("hwbi,hwbj->hwij", offset, offset)
    if kind == "paper":
        return scatter / (count - 1) + 0.01 * np.eye(sum(channels))
    pooled = scatter.mean((0, 1)) / (count - 1)
    ridge = np.concatenate(
        [
            np.full(size, 0.01 * np.diag(pooled)[sum(channels[:level]) :][:size].mean())
            for level, size in enumerate(channels)
        ]
    )
    return 0.9 * scatter / (count - 1) + 0.1 * pooled + np.diag(ridge)


def squared_distances(fitted: list[np.ndarray], scored: list[np.ndarray], kind: str) -> np.ndarray:
    """Squared Mahalanobis distances (B, H, W) of `scored` from the Gaussians of `fitted`."""
    train = embeddings(fitted)
    covariance = covariances(train, [level.shape[1] for level in fitted], kind)
    offset = embeddings(scored) - train.mean(2, keepdims=True)
    return np.einsum("hwbi,hwij,hwbj->bhw", offset, np.linalg.inv(covariance), offset)
