import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.scoring.regions import find_regions


def flood(mask):
    """8-connected components as sets of (row, column), by a flood fill pixel by pixel."""
    left, components = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        open_, component = [left.pop()], set()
        while open_:
            y, x = open_.pop()
            component.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            open_.extend(near)
        components.append(component)
    return components


@given(st.integers(0, 2**32), st.floats(0.3, 0.9))
def test_regions_are_the_connected_components(seed, threshold):
    anomaly_map = np.random.default_rng(seed).random((12, 17)).astype(np.float32)
    regions = find_regions(anomaly_map, threshold, Preprocessing((12, 17)), 17, 12)
    expected = []
    for component in flood(anomaly_map >= threshold):
        rows, columns = (np.array(axis) for axis in zip(*component, strict=True))
        box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        expected.append((*box, anomaly_map[rows, columns].max(), len(component)))
    found = [tuple(region.values()) for region in regions]
    assert sorted(found) == sorted(expected)
    assert [region[4] for region in found] == sorted((region[4] for region in found), reverse=True)


def test_boxes_are_in_the_original_images_pixels():
    """A 200×100 image is resized to 40×40, of which the model sees the middle 20×20."""
    anomaly_map = np.zeros((20, 20), np.float32)
    anomaly_map[2:4, 5:10] = 3
    seen = Preprocessing((40, 40), (20, 20))
    (region,) = find_regions(anomaly_map, 1, seen, width=200, height=100)
    assert region == {"x": 75, "y": 30, "width": 25, "height": 5, "peak": 3, "area": 125}


def test_boxes_of_a_letterboxed_image_are_in_its_pixels_and_the_background_has_none():
    """A 200×100 image lies in rows 10 to 30 of the 40×40 that the model sees."""
    anomaly_map = np.zeros((40, 40), np.float32)
    anomaly_map[:12, 5:10] = 3
    anomaly_map[35:, 20] = 9
    seen = Preprocessing((40, 40), letterbox=True)
    (region,) = find_regions(anomaly_map, 1, seen, width=200, height=100)
    assert region == {"x": 25, "y": 0, "width": 25, "height": 10, "peak": 3, "area": 250}


def test_boxes_touch_every_pixel_and_stay_inside():
    """The image is smaller than the model's input, so a map's pixel is a fraction of its pixel."""
    anomaly_map = np.zeros((16, 16), np.float32)
    anomaly_map[15, 15] = anomaly_map[3, 0] = 2
    regions = find_regions(anomaly_map, 1, Preprocessing((16, 16)), width=5, height=7)
    assert [tuple(region[k] for k in ("x", "y", "width", "height")) for region in regions] == [
        (0, 1, 1, 1),
        (4, 6, 1, 1),
    ]


def test_small_regions_are_left_out():
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[0, 0], anomaly_map[5:7, 5:7] = 9, 5
    regions = find_regions(anomaly_map, 1, Preprocessing((10, 10)), 20, 20, min_area=5)
    assert [(region["peak"], region["area"]) for region in regions] == [(5, 16)]


def test_a_map_of_zeros_has_no_regions():
    assert find_regions(np.zeros((8, 8)), 1, Preprocessing((8, 8)), 8, 8) == []


def test_a_map_below_the_threshold_shows_its_highest_part():
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[2, 3:5], anomaly_map[8, 8] = [5, 4.6], 4.4
    (region,) = find_regions(anomaly_map, 6, Preprocessing((10, 10)), 10, 10)
    assert region == {"x": 3, "y": 2, "width": 2, "height": 1, "peak": 5, "area": 2}
