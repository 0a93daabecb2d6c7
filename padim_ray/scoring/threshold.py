"""Conformal thresholds and p-values, from leave-one-out scores."""

import numpy as np


def p_values(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(1 + number of leave-one-out scores ≥ score) / (n+1), float64; NaN for NaN.

    Args:
        scores: (m,).
        reference: leave-one-out scores (n,), ascending.
    """
    not_below = len(reference) - np.searchsorted(reference, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + not_below) / (len(reference) + 1))


def is_flagged(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which scores are above the threshold, which is rounded to their type: (n,) floats → bool."""
    return scores > scores.dtype.type(threshold)
