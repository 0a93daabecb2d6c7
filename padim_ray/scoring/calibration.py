"""A group's calibration: the leave-one-out results of its training images, and their checks."""

from dataclasses import dataclass

import numpy as np

from padim_ray.errors import ModelError
from padim_ray.scoring import threshold
from padim_ray.scoring.histogram import BINS, bin_edges, bin_indices


@dataclass(frozen=True)
class Calibration:
    """A group's leave-one-out results; see `threshold` for the formulas.

    `scores`: image scores (n,) float32, ascending. `pixels`: histogram of the anomaly maps' values
    in the bins of `histogram`, (BINS,) int64.
    """

    scores: np.ndarray
    pixels: np.ndarray

    def __add__(self, other: "Calibration") -> "Calibration":
        """Merge the results of two disjoint sets of images."""
        scores = np.sort(np.concatenate([self.scores, other.scores]))
        return Calibration(scores, self.pixels + other.pixels)

    def reaches(self, alpha: float) -> bool:
        """Whether there are enough images for the false-alarm rate α: n + 1 ≥ 1/α."""
        return threshold.reaches(len(self.scores), alpha)

    def threshold(self, alpha: float) -> float:
        """The score that good images exceed at a rate of at most α, or the largest score."""
        return threshold.conformal_threshold(self.scores, alpha)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Conformal p-values of scores (m,), float64; NaN for a NaN score."""
        return threshold.p_values(scores, self.scores)

    def pixel_threshold(self, alpha: float) -> float:
        """The smallest bin edge that at most a share α of the maps' pixels reach."""
        return threshold.pixel_threshold(self.pixels, alpha)


def read_scores(scores: np.ndarray) -> np.ndarray:
    """Check stored leave-one-out scores (n,) float32 and return them.

    Raises:
        ModelError: if they are not ascending, or one is negative, infinite or NaN.
    """
    # written so that NaN fails: comparisons with it are false
    if not ((scores >= 0) & (scores < np.inf)).all() or not (scores[:-1] <= scores[1:]).all():
        raise ModelError("its scores are not finite, non-negative and ascending")
    return scores


def count_pixels(values: np.ndarray, counts: np.ndarray, pixels: int) -> np.ndarray:
    """Expand a stored histogram to the counts of all bins, (BINS,) int64.

    Args:
        values: lower edges of the non-empty bins, ascending.
        counts: pixels in each of these bins.
        pixels: the expected sum of the counts.

    Raises:
        ModelError: if `values` are not ascending bin edges, or `counts` don't add up to `pixels`.
    """
    bins = bin_indices(np.nan_to_num(values))
    if not np.array_equal(bin_edges()[bins], values) or not (np.diff(bins) > 0).all():
        raise ModelError("its values are not ascending bin edges")
    # each count is checked before their sum, which may overflow
    if not ((counts > 0) & (counts <= pixels)).all() or counts.sum() != pixels:
        raise ModelError(f"its counts are not positive numbers that add up to {pixels} pixels")
    histogram = np.zeros(BINS, np.int64)
    histogram[bins] = counts
    return histogram
