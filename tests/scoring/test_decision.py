import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.decision import Decision
from padim_ray.scoring.histogram import count_values
from padim_ray.scoring.regions import find_regions


def calibration(count, seed=0):
    values = np.sort(np.random.default_rng(seed).gamma(9, 2, count).astype(np.float32))
    return Calibration(values, count_values(values))


def flood(mask):
    """8-connected components as sets of (row, column), one pixel after the other."""
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
    """Resized to 40×40 from 200 wide and 100 high, of which the middle 20×20 are seen."""
    anomaly_map = np.zeros((20, 20), np.float32)
    anomaly_map[2:4, 5:10] = 3
    seen = Preprocessing((40, 40), (20, 20))
    (region,) = find_regions(anomaly_map, 1, seen, width=200, height=100)
    assert region == {"x": 75, "y": 30, "width": 25, "height": 5, "peak": 3, "area": 125}


def test_boxes_touch_every_pixel_and_stay_inside():
    """Of an image smaller than the model's input, a map's pixel is a fraction of one."""
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


def test_a_given_threshold_replaces_the_calibrations():
    judged = Decision.of(calibration(500), alpha=0.01, pixel_alpha=0.001, given=12.5)
    assert judged.threshold == 12.5 and judged.pixel_threshold == 12.5 and judged.note is None
    scores = np.array([12.5, 12.6, np.nan], np.float32)
    assert judged.flags(scores).tolist() == [False, True, False]
    assert np.isfinite(judged.p_values(scores)).tolist() == [True, True, False]


def test_every_flagged_image_has_a_region():
    reference = calibration(500)
    judged = Decision.of(reference, alpha=0.2, pixel_alpha=1e-6)
    assert reference.pixel_threshold(1e-6) > judged.threshold == judged.pixel_threshold


def test_too_few_images_for_alpha_are_said():
    judged = Decision.of(calibration(40), alpha=0.01, pixel_alpha=0.001)
    assert judged.threshold == judged.reference[-1]
    assert "40 training images can't give a false-alarm rate of 0.01, which takes 99" in (
        judged.note
    )
    assert Decision.of(calibration(99), alpha=0.01, pixel_alpha=0.001).note is None


def test_without_a_calibration_nothing_is_judged():
    judged = Decision.of(None, alpha=0.01, pixel_alpha=0.001)
    assert judged.threshold is None and judged.pixel_threshold is None
    assert "nothing is called anomalous" in judged.note
    scores = np.array([1e9], np.float32)
    assert not judged.flags(scores).any() and np.isnan(judged.p_values(scores)).all()
    assert judged.excess(scores) == scores


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_excess_is_one_at_the_threshold(alpha):
    judged = Decision.of(calibration(200), alpha, 0.001)
    assert judged.excess(np.float32(judged.threshold)) == pytest.approx(1)
