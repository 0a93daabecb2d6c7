import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.drift import LOWER_SHARE, measure_drift


def p_values(rng, images, *, factor=1.0, defective=0.0, reference=1000):
    scores = rng.gamma(9, 2, images) * factor
    scores[: int(defective * images)] *= 10
    return Calibration(np.sort(rng.gamma(9, 2, reference)), np.zeros(1)).p_values(scores)


def distance_by_hand(p):
    """The largest gap between the distribution functions, on both sides of each step."""
    kept = np.sort(p)[len(p) - int(np.ceil(LOWER_SHARE * len(p))) :]
    uniform = np.clip((kept - (1 - LOWER_SHARE)) / LOWER_SHARE, 0, 1)
    steps = np.arange(len(kept) + 1) / len(kept)
    return max((steps[1:] - uniform).max(), (uniform - steps[:-1]).max())


@given(st.lists(st.floats(1e-3, 1), min_size=15, max_size=200))
def test_the_distance_is_that_of_kolmogorov_and_smirnov(p):
    assert measure_drift(np.array(p), 999).distance == pytest.approx(distance_by_hand(np.array(p)))


@pytest.mark.parametrize("images", [20, 200, 5000])
def test_images_like_the_training_images_show_drift_once_in_a_thousand_runs(images):
    rng = np.random.default_rng()
    runs = [measure_drift(p_values(rng, images), 1000).has_changed for _ in range(1000)]
    assert sum(runs) <= 15  # expected: 1; 2 with 20 images, since the distribution is asymptotic


@pytest.mark.parametrize("images", [200, 5000])
def test_a_few_defects_are_no_drift(images):
    drift = measure_drift(p_values(np.random.default_rng(0), images, defective=0.08), 1000)
    assert not drift.has_changed
    assert drift.meaning("line7") == "line7's images are like those that the model was fitted to"


@pytest.mark.parametrize(
    ("factor", "words"), [(1.5, "have changed since the model was fitted: refit"), (0.6, "lower")]
)
def test_changed_images_are_drift_with_a_direction(factor, words):
    drift = measure_drift(p_values(np.random.default_rng(0), 500, factor=factor), 1000)
    assert drift.has_changed and drift.higher == (factor > 1)
    assert words in drift.meaning("line7") and drift.meaning("line7").startswith("line7's images")


@pytest.mark.parametrize(("images", "reference"), [(0, 1000), (3, 1000), (5000, 0), (5000, 9)])
def test_with_too_few_images_drift_is_not_tested(images, reference):
    assert measure_drift(np.full(images, 0.01), reference) is None
