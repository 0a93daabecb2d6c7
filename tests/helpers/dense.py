"""PaDiM as the paper writes it, dense and in float64: the reference for the nested blocks."""

import numpy as np


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
