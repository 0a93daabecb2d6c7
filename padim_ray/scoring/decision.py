"""A group's decision: which images are anomalous, by threshold and p-value."""

from dataclasses import dataclass

import numpy as np

from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.threshold import is_flagged, min_images, p_values


@dataclass(frozen=True, eq=False)
class Decision:
    """How a group's images are judged.

    `threshold`: images with a higher score are anomalous; None if the group has no threshold.
    `pixel_threshold`: pixels whose value in the anomaly map reaches it form regions. It is never
    above the image threshold. `reference`: leave-one-out scores (n,), ascending. `note`: a caveat
    about the threshold, for the user.
    """

    threshold: float | None
    pixel_threshold: float | None
    reference: np.ndarray
    note: str | None = None

    @classmethod
    def of(
        cls,
        calibration: Calibration | None,
        alpha: float,
        pixel_alpha: float,
        given: float | None = None,
    ) -> "Decision":
        """Derive the thresholds from a calibration.

        Args:
            calibration: None if the group has none.
            alpha: the false-alarm rate, as a share of good images.
            pixel_alpha: the share of good images' pixels that may belong to a region.
            given: a threshold chosen by the user, which takes precedence over `alpha`.
        """
        note = None
        if calibration is None:
            if given is None:
                note = "the model has no leave-one-out scores of it: nothing is called anomalous"
            return cls(given, given, np.empty(0, np.float32), note)
        threshold = given
        if threshold is None:
            threshold = calibration.threshold(alpha)
            if not calibration.reaches(alpha):
                note = (
                    f"{len(calibration.scores)} training images can't give a false-alarm rate "
                    f"of {alpha:g}, which takes {min_images(alpha)}: the largest leave-one-out "
                    "score is the threshold"
                )
        pixel_threshold = min(calibration.pixel_threshold(pixel_alpha), threshold)
        return cls(threshold, pixel_threshold, calibration.scores, note)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Conformal p-values of scores (n,); NaN for a NaN score or without a reference."""
        if not len(self.reference):
            return np.full(len(scores), np.nan)
        return p_values(scores, self.reference)

    def flags(self, scores: np.ndarray) -> np.ndarray:
        """Which scores (n,) are anomalous: none that is NaN, and none without a threshold."""
        if self.threshold is None:
            return np.zeros(len(scores), bool)
        return is_flagged(scores, self.threshold)

    def excess(self, scores: np.ndarray) -> np.ndarray:
        """Scores divided by the threshold, which makes groups comparable."""
        return scores / self.threshold if self.threshold else scores
