"""Drift: whether a run's images, apart from the most anomalous, are like the training images."""

import math
from dataclasses import dataclass

import numpy as np

LOWER_SHARE = 0.9  # of a run's images, which drift is measured on: defects are among the others
SIGNIFICANCE = 0.001
LARGEST_CRITICAL = 0.6  # beyond, there are too few images to tell anything
SMALLEST = 0.15  # in millions of images, differences that matter to nobody are significant


@dataclass(frozen=True)
class Drift:
    """How far a run's images are from the training images, by their p-values.

    `distance`: Kolmogorov-Smirnov's, 0 to 1, between the p-values of the run's lower-scored 90 % of
    images and uniform ones. `critical`: the distance to be exceeded by chance once in a thousand
    runs. `higher`: whether the run's images score higher, not lower, than the training images did.
    """

    distance: float
    critical: float
    higher: bool

    @property
    def has_changed(self) -> bool:
        return self.distance > max(self.critical, SMALLEST)

    def meaning(self, group: str) -> str:
        """The verdict in words."""
        if not self.has_changed:
            return f"{group}'s images are like those that the model was fitted to"
        if self.higher:
            return f"{group}'s images have changed since the model was fitted: refit"
        return (
            f"{group}'s images score lower than good images that the model hasn't seen: they were "
            "fitted to, or hardly vary"
        )


def measure_drift(p_values: np.ndarray, calibration_images: int) -> Drift | None:
    """Compare a run's p-values (n,) of one group with those of good images.

    The critical distance is that of two samples, since the reference is itself a sample. None if
    either has too few images.
    """
    if not len(p_values) or not calibration_images:
        return None
    from scipy import stats  # half a second, which fitting can do without

    lowest_scored = np.sort(p_values)[-math.ceil(LOWER_SHARE * len(p_values)) :]
    uniform = stats.uniform(1 - LOWER_SHARE, LOWER_SHARE)
    sizes = LOWER_SHARE * np.array([len(p_values), calibration_images])
    critical = stats.kstwobign.isf(SIGNIFICANCE) * np.sqrt((1 / sizes).sum())
    if critical > LARGEST_CRITICAL:
        return None
    return Drift(
        distance=float(stats.ks_1samp(lowest_scored, uniform.cdf, method="asymp").statistic),
        critical=float(critical),
        higher=bool(np.median(lowest_scored) < uniform.median()),
    )
