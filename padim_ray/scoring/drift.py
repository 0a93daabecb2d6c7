"""Drift: whether a run's images still score like the training images did."""

import math
from dataclasses import dataclass

import numpy as np

LOWER_SHARE = 0.9  # the highest scores are left out: they may be defects
SIGNIFICANCE = 0.001
MAX_CRITICAL = 0.6  # above, there are too few images for a test
MIN_DISTANCE = 0.15  # in millions of images, irrelevant differences are significant too


@dataclass(frozen=True)
class Drift:
    """How far the scores of a run's images are from those of the training images.

    `distance`: Kolmogorov-Smirnov distance, 0 to 1, between the uniform distribution and the
    p-values of the 90 % of images with the lowest scores. `critical`: the distance that chance
    alone exceeds once in a thousand runs. `higher`: whether the run's images score higher than the
    training images, rather than lower.
    """

    distance: float
    critical: float
    higher: bool

    @property
    def has_changed(self) -> bool:
        """Whether the difference is significant, and large enough to matter."""
        return self.distance > max(self.critical, MIN_DISTANCE)

    def meaning(self, group: str) -> str:
        """The verdict in a sentence, without a full stop."""
        if not self.has_changed:
            return f"{group}'s images are like those that the model was fitted to"
        if self.higher:
            return f"{group}'s images have changed since the model was fitted: refit it"
        return (
            f"{group}'s images score lower than unseen good images do: the model was fitted to "
            "them, or they hardly vary"
        )


def measure_drift(p_values: np.ndarray, calibration_images: int) -> Drift | None:
    """Compare the p-values of a run's images of one group with the uniform distribution.

    The critical distance is that of the two-sample test, since the leave-one-out scores behind the
    p-values are a sample too.

    Args:
        p_values: (n,), without NaN.
        calibration_images: the number of leave-one-out scores.

    Returns:
        None if there are too few images for a test.
    """
    if not len(p_values) or not calibration_images:
        return None
    from scipy import stats  # imported here: it takes half a second, and fitting doesn't need it

    lowest_scored = np.sort(p_values)[-math.ceil(LOWER_SHARE * len(p_values)) :]
    uniform = stats.uniform(1 - LOWER_SHARE, LOWER_SHARE)
    sizes = LOWER_SHARE * np.array([len(p_values), calibration_images])
    critical = stats.kstwobign.isf(SIGNIFICANCE) * np.sqrt((1 / sizes).sum())
    if critical > MAX_CRITICAL:
        return None
    return Drift(
        distance=float(stats.ks_1samp(lowest_scored, uniform.cdf, method="asymp").statistic),
        critical=float(critical),
        higher=bool(np.median(lowest_scored) < uniform.median()),
    )
