"""Conformal thresholds and p-values, from the leave-one-out results of good images.

A training image's leave-one-out score is the score that it would get as an unseen image. The rank
of a new good image's score among n of them is uniform, whatever their distribution (Vovk, Gammerman
and Shafer, "Algorithmic Learning in a Random World"; Laxhammar and Falkman 2010 for anomaly
detection). This holds approximately: leave-one-out scores come from models of n − 1 images, new
scores from a model of n.
"""

import math

import numpy as np

from padim_ray.scoring.histogram import bin_edges

_TOLERANCE = 1e-9  # rounding: in float64, 0.29 × 100 is 28.999999999999996


def conformal_threshold(reference: np.ndarray, alpha: float) -> float:
    """The ⌈(n+1)(1−α)⌉-th smallest leave-one-out score.

    New good images exceed it at a rate of at most α. If n is too small for that (see `reaches`),
    it is the largest score.

    Args:
        reference: leave-one-out scores (n,), ascending.
        alpha: the false-alarm rate, 0 < α < 1.
    """
    return float(reference[len(reference) - max(_rank_from_top(len(reference), alpha), 1)])


def reaches(images: int, alpha: float) -> bool:
    """Whether a threshold from n images can keep to the false-alarm rate α: n + 1 ≥ 1/α."""
    return _rank_from_top(images, alpha) >= 1


def min_images(alpha: float) -> int:
    """The smallest number of images that reaches the false-alarm rate α: ⌈1/α⌉ − 1."""
    return math.ceil(1 / alpha - _TOLERANCE) - 1


def p_values(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(1 + number of leave-one-out scores ≥ score) / (n + 1), float64; NaN for a NaN score.

    Args:
        scores: (m,).
        reference: leave-one-out scores (n,), ascending.
    """
    not_below = len(reference) - np.searchsorted(reference, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + not_below) / (len(reference) + 1))


def is_flagged(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which scores exceed the threshold, rounded to their dtype: (n,) floats → (n,) bool."""
    return scores > scores.dtype.type(threshold)


def pixel_threshold(counts: np.ndarray, alpha: float) -> float:
    """The smallest bin edge that at most a share α of the pixels reach.

    Args:
        counts: pixels per bin of `histogram`, (BINS,), of good images' anomaly maps.
        alpha: a share of the pixels.
    """
    reaching = np.append(counts[::-1].cumsum()[::-1], 0)
    return float(bin_edges()[np.argmax(reaching <= alpha * reaching[0])])


def _rank_from_top(images: int, alpha: float) -> int:
    """⌊α(n+1)⌋: the threshold's rank among n leave-one-out scores, counted from the largest."""
    return math.floor(alpha * (images + 1) + _TOLERANCE)
