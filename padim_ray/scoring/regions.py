"""Regions: the connected parts of an anomaly map that reach a threshold."""

from typing import TypedDict

import numpy as np
from scipy import ndimage

from padim_ray.images.preprocessing import Preprocessing

PEAK_SHARE = 0.9
_EIGHT_CONNECTED = np.ones((3, 3), bool)


class Region(TypedDict):
    """A region's bounding box and area, in pixels of the upright original image, and its peak.

    `x`, `y`: the top left corner of the box. `peak`: the highest value of the anomaly map.
    """

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
    """Find the 8-connected regions that reach the threshold, the highest peak first.

    If the map doesn't reach it anywhere, they are those that reach `PEAK_SHARE` of its maximum: an
    image may be anomalous by the mean of several cells, and still show where.

    Args:
        anomaly_map: (h, w), in pixels of the model's input.
        threshold: smallest value of a region's pixels.
        preprocessing: the model's preprocessing, which maps its input to the original image.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        min_area: smaller regions are dropped; in pixels of the original image.
    """
    placement = preprocessing.placement(height, width)
    inside = placement.inside(anomaly_map.shape)
    highest = anomaly_map[inside].max()
    if 0 < highest < threshold:
        threshold = PEAK_SHARE * highest
    reached = np.zeros(anomaly_map.shape, bool)
    reached[inside] = anomaly_map[inside] >= threshold
    labels, count = ndimage.label(reached, _EIGHT_CONNECTED)
    numbers = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, numbers)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    down, across = height / placement.height, width / placement.width
    regions = []
    for box, peak, size in zip(ndimage.find_objects(labels), peaks, sizes, strict=True):
        area = round(size * down * across)
        if area < min_area:
            continue
        y, bottom = _scaled(box[0], -placement.top, down, height)
        x, right = _scaled(box[1], -placement.left, across, width)
        regions.append(
            Region(x=x, y=y, width=right - x, height=bottom - y, peak=float(peak), area=area)
        )
    return sorted(regions, key=lambda region: -region["peak"])


def _scaled(pixels: slice, offset: int, factor: float, size: int) -> tuple[int, int]:
    """The range of original pixels, start to stop, that a slice of the model's pixels touches."""
    start = int((pixels.start + offset) * factor + 1e-6)
    stop = int(np.ceil((pixels.stop + offset) * factor - 1e-6))
    return start, min(max(stop, start + 1), size)
