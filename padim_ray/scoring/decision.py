"""What is anomalous: a group's threshold and p-values, and the regions of an image."""

from dataclasses import dataclass

import numpy as np

from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.threshold import is_flagged, p_values


@dataclass(frozen=True, eq=False)
class Decision:
    """How a group's images are judged.

    `threshold`: the score above which an image is anomalous; None if nothing says it.
    `pixel_threshold`: the anomaly map's value from which on a pixel belongs to a region; never
    above the image threshold, so that every anomalous image has one. `reference`: leave-one-out
    scores (n,), ascending. `note`: what is to be known about the threshold, in a sentence.
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
        """Judge by a calibration.

        Args:
            calibration: None if the group has none.
            alpha: the false-alarm rate asked for, of images.
            pixel_alpha: the share of good images' pixels that may belong to a region.
            given: a user's threshold, which replaces the calibration's.
        """
        if calibration is None:
            note = "the model has no leave-one-out scores of it: nothing is called anomalous"
            return cls(given, given, np.empty(0, np.float32), note if given is None else None)
        threshold, note = given, None
        if threshold is None:
            threshold = calibration.threshold(alpha)
            if not calibration.reaches(alpha):
                note = (
                    f"{len(calibration.scores)} training images can't give a false-alarm rate "
                    f"of {alpha:g}, which takes {np.ceil(1 / alpha - 1e-9) - 1:.0f}: the largest "
                    "of them is the threshold"
                )
        pixel_threshold = min(calibration.pixel_threshold(pixel_alpha), threshold)
        return cls(threshold, pixel_threshold, calibration.scores, note)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Of scores (n,); NaN without a reference, and for NaN."""
        if not len(self.reference):
            return np.full(len(scores), np.nan)
        return p_values(scores, self.reference)

    def flags(self, scores: np.ndarray) -> np.ndarray:
        """Which scores (n,) are anomalous; NaN, and what has no threshold, is not."""
        if self.threshold is None:
            return np.zeros(len(scores), bool)
        return is_flagged(scores, self.threshold)

    def excess(self, scores: np.ndarray) -> np.ndarray:
        """Scores in units of the threshold, which groups have in common."""
        return scores / self.threshold if self.threshold else scores
