"""Thresholds and p-values from good images alone: leave-one-out scores as a conformal reference.

A training image's leave-one-out score is what it would have had as an image never seen. A new good
image's rank among these scores is uniform, whatever their distribution (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World"; Laxhammar and Falkman 2010 for anomalies).
"""

import math
from dataclasses import dataclass

import numpy as np

from padim_ray.errors import ModelError
from padim_ray.scoring.histogram import BINS, bin_edges, bin_indices
from padim_ray.scoring.threshold import p_values


@dataclass(frozen=True)
class Calibration:
    """A group's leave-one-out results.

    `scores`: image scores (n,) float32, ascending. `pixels`: their anomaly maps' values, counted in
    the bins of `histogram`, (BINS,) int64.
    """

    scores: np.ndarray
    pixels: np.ndarray

    def __add__(self, other: "Calibration") -> "Calibration":
        """Both samples' results together."""
        scores = np.sort(np.concatenate([self.scores, other.scores]))
        return Calibration(scores, self.pixels + other.pixels)

    def reaches(self, alpha: float) -> bool:
        """Whether there are images enough for a false-alarm rate: n + 1 ≥ 1/α."""
        return self._above(alpha) >= 1

    def threshold(self, alpha: float) -> float:
        """The ⌈(n+1)(1−α)⌉-th smallest score: good images exceed it at a rate of at most α.

        Where that can't be reached, the largest score.
        """
        return float(self.scores[len(self.scores) - max(self._above(alpha), 1)])

    def _above(self, alpha: float) -> int:
        """⌊α(n+1)⌋, spared from rounding: 0.01 times 300 is 3."""
        return math.floor(alpha * (len(self.scores) + 1) + 1e-9)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """See `p_values`, with these leave-one-out scores as reference."""
        return p_values(scores, self.scores)

    def pixel_threshold(self, alpha: float) -> float:
        """The smallest bin's edge that at most a share α of the maps' pixels reach."""
        reaching = np.append(self.pixels[::-1].cumsum()[::-1], 0)
        return float(bin_edges()[np.argmax(reaching <= alpha * reaching[0])])


def read_scores(scores: np.ndarray) -> np.ndarray:
    """Stored leave-one-out scores (n,), float32, if that is what they can be.

    Raises:
        ModelError: if they are not ascending, negative, infinite or NaN.
    """
    # comparisons are false for NaN
    if not ((scores >= 0) & (scores < np.inf)).all() or not (scores[:-1] <= scores[1:]).all():
        raise ModelError("it doesn't hold ascending scores")
    return scores


def count_pixels(values: np.ndarray, counts: np.ndarray, pixels: int) -> np.ndarray:
    """A stored histogram as counts of all bins, (BINS,) int64.

    Args:
        values: lower edges of the bins that hold something, ascending.
        counts: theirs.
        pixels: how many there are in all.

    Raises:
        ModelError: if it isn't a histogram of so many pixels.
    """
    bins = bin_indices(np.nan_to_num(values))
    if not np.array_equal(bin_edges()[bins], values) or not (np.diff(bins) > 0).all():
        raise ModelError("its values are not bins' edges, ascending")
    # each on its own first: a sum may overflow
    if not ((counts > 0) & (counts <= pixels)).all() or counts.sum() != pixels:
        raise ModelError(f"it doesn't hold the counts of {pixels} pixels")
    histogram = np.zeros(BINS, np.int64)
    histogram[bins] = counts
    return histogram
