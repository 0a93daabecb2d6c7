"""What is anomalous: a group's threshold and p-values, and the regions of an image."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
from scipy import ndimage

from padim_ray.calibration import Calibration
from padim_ray.preprocessing import Preprocessing

EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Decision:
    """How a group's images are judged.

    `calibration`: None if the group has none. `alpha`: the false-alarm rate asked for, of images.
    `pixel_alpha`: the share of good images' pixels that may belong to a region. `given`: a user's
    threshold, which replaces the calibration's.
    """

    calibration: Calibration | None
    alpha: float
    pixel_alpha: float
    given: float | None = None

    @cached_property
    def threshold(self) -> float | None:
        """The score above which an image is anomalous; None if nothing says it."""
        if self.given is not None or self.calibration is None:
            return self.given
        return self.calibration.threshold(self.alpha)

    @cached_property
    def pixel_threshold(self) -> float | None:
        """The anomaly map's value from which on a pixel belongs to a region.

        A share `pixel_alpha` of good images' pixels reach it. Never above the image threshold, so
        that every anomalous image has a region.
        """
        if self.threshold is None or self.calibration is None:
            return self.threshold
        return min(self.calibration.pixel_threshold(self.pixel_alpha), self.threshold)

    @property
    def note(self) -> str | None:
        """What is to be known about the threshold, in a sentence."""
        if self.given is not None:
            return None
        if self.calibration is None:
            return "the model has no leave-one-out scores of it: nothing is called anomalous"
        if not self.calibration.reaches(self.alpha):
            return (
                f"{len(self.calibration.scores)} leave-one-out scores can't give a false-alarm "
                f"rate of {self.alpha:g}, which takes {np.ceil(1 / self.alpha - 1e-9) - 1:.0f}: "
                "the largest of them is the threshold"
            )
        return None

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Of scores (n,); NaN without a calibration, and for NaN."""
        if self.calibration is None:
            return np.full(len(scores), np.nan)
        return self.calibration.p_values(scores)

    def flags(self, scores: np.ndarray) -> np.ndarray:
        """Which scores (n,) are anomalous; NaN, and what has no threshold, is not."""
        if self.threshold is None:
            return np.zeros(len(scores), bool)
        return scores > np.float32(self.threshold)

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
