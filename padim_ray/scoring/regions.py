"""The regions of an anomaly map that reach a threshold."""

from typing import TypedDict

import numpy as np
from scipy import ndimage

from padim_ray.images.preprocessing import Preprocessing

EIGHT_CONNECTED = np.ones((3, 3), bool)


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
