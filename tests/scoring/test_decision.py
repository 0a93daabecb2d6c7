import numpy as np
import pytest

from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.decision import Decision
from padim_ray.scoring.histogram import count_values


def calibration(count, seed=0):
    values = np.sort(np.random.default_rng(seed).gamma(9, 2, count).astype(np.float32))
    return Calibration(values, count_values(values))


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


def test_too_few_images_for_alpha_are_noted():
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
