"""What is anomalous: a group's threshold and p-values, and the regions of an image."""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from scipy import ndimage

from padim_ray.calibration import Calibration, p_values
from padim_ray.metrics import is_flagged
from padim_ray.preprocessing import Preprocessing

EIGHT_CONNECTED = np.ones((3, 3), bool)


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


class Region(TypedDict):
    """A box in the upright original image's pixels, its highest value, and the region's area."""

    x: int
    y: int
    width: int
    height: int
    peak: float
    area: int


def find_regions(
    anomaly_map: np.ndarray,
    threshold: float,
    preprocessing: Preprocessing,
    width: int,
    height: int,
    min_area: int = 0,
) -> list[Region]:
    """Find the 8-connected regions of an anomaly map that reach a threshold, highest peak first.

    Args:
        anomaly_map: (h, w), in the model's input pixels.
        preprocessing: the model's, which says where they are in the image.
        width: of the original image, in pixels; so is `height`.
        min_area: of the regions that are kept, in the original image's pixels.
    """
    labels, count = ndimage.label(anomaly_map >= threshold, EIGHT_CONNECTED)
    numbers = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, numbers)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    (top, left), (rows, columns) = preprocessing.corner, preprocessing.resize
    down, across = height / rows, width / columns
    regions = []
    for box, peak, size in zip(ndimage.find_objects(labels), peaks, sizes, strict=True):
        area = round(size * down * across)
        if area < min_area:
            continue
        y, bottom = _scaled(box[0], top, down, height)
        x, right = _scaled(box[1], left, across, width)
        regions.append(
            Region(x=x, y=y, width=right - x, height=bottom - y, peak=float(peak), area=area)
        )
    return sorted(regions, key=lambda region: -region["peak"])


def _scaled(pixels: slice, offset: int, factor: float, size: int) -> tuple[int, int]:
    """The whole pixels of the original that a run of the model's input pixels touches."""
    start = int((pixels.start + offset) * factor + 1e-6)
    stop = int(np.ceil((pixels.stop + offset) * factor - 1e-6))
    return start, min(max(stop, start + 1), size)
