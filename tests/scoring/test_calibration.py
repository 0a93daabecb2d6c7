import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from padim_ray.densities.gaussian.leave_one_out import leave_one_out_squared_distances
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import factorise, squared_distances
from padim_ray.features.grid import PatchGrid
from padim_ray.scoring.anomaly_map import AnomalyMapper, image_scores
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import BINS, bin_edges, count_values
from tests.densities.test_moments import of
from tests.helpers.features import nest

SCORES = st.lists(st.floats(0.125, 1000, width=32), min_size=1, max_size=300)


def calibrated(scores):
    return Calibration(np.sort(np.array(scores, np.float32)), np.zeros(BINS, np.int64))


@given(SCORES, SCORES)
def test_p_values_count_the_scores_that_are_not_lower(reference, new):
    expected = [(1 + sum(r >= x for r in reference)) / (len(reference) + 1) for x in new]
    p_values = calibrated(reference).p_values(np.array(new, np.float32))
    np.testing.assert_allclose(p_values, expected)


def test_failed_images_have_no_p_value():
    assert np.isnan(calibrated([1, 2]).p_values(np.array([np.nan, 1.5], np.float32))).tolist() == [
        True,
        False,
    ]


@given(st.sets(st.floats(0.125, 1000, width=32), min_size=1, max_size=300), SCORES, st.data())
def test_an_image_is_above_the_threshold_exactly_if_its_p_value_is_at_most_alpha(
    reference, new, data
):
    calibration = calibrated(list(reference))
    fewest = 1 / (len(reference) + 1)
    alpha = data.draw(st.floats(fewest, 0.5) if fewest < 0.5 else st.just(0.5))
    assert calibration.reaches(alpha)
    scores = np.array(new, np.float32)
    above = scores > calibration.threshold(alpha)
    not_by_rounding = np.abs(calibration.p_values(scores) - alpha) > 1e-8
    below = calibration.p_values(scores) <= alpha
    np.testing.assert_array_equal(above[not_by_rounding], below[not_by_rounding])


@pytest.mark.parametrize("images", [99, 199, 299, 2000])
def test_the_threshold_is_the_conformal_quantile(images):
    scores = np.random.default_rng(images).permutation(images) + 1.0
    for percent in (1, 5, 10):
        rank = math.ceil((images + 1) * (100 - percent) / 100 - 1e-9)
        assert calibrated(scores).threshold(percent / 100) == rank


def test_with_too_few_images_the_threshold_is_the_largest_score():
    few = calibrated([3, 1, 2])
    assert few.reaches(0.25) and not few.reaches(0.24)
    assert few.threshold(0.01) == 3


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.01, 0.05, 0.5]))
def test_the_pixel_threshold_is_the_smallest_edge_that_few_enough_pixels_reach(seed, alpha):
    values = np.random.default_rng(seed).gamma(5, 2, 10_000).astype(np.float32)
    threshold = Calibration(np.ones(1, np.float32), count_values(values)).pixel_threshold(alpha)
    assert (values >= threshold).mean() <= alpha
    edges = bin_edges()
    below = edges[np.searchsorted(edges, threshold) - 1]
    assert (values >= below).mean() > alpha


def test_samples_add_up():
    values = np.random.default_rng(0).gamma(5, 2, 100).astype(np.float32)
    parts = [Calibration(np.sort(x), count_values(x)) for x in (values[:30], values[30:])]
    both = parts[0] + parts[1]
    np.testing.assert_array_equal(both.scores, np.sort(values))
    np.testing.assert_array_equal(both.pixels, count_values(values))


def flagged_share(kind, rng, fitted, fresh, alphas):
    """The share of fresh good images that is flagged, at each alpha: Gaussian features."""
    grid = PatchGrid(((4, 4), (2, 2)), (3, 5))
    mixing = [rng.normal(0, 0.2, (channels, channels)) for channels in grid.channels]

    def draw(images):
        levels = [
            1 + rng.normal(size=(images, *cells, len(mix))) @ mix
            for cells, mix in zip(grid.grids, mixing, strict=True)
        ]
        return nest(grid, [level.transpose(0, 3, 1, 2).astype(np.float32) for level in levels])

    def scores(squared):
        return image_scores(mapper.maps(grid.unnest(squared).sqrt())).numpy()

    mapper = AnomalyMapper((4, 4), (16, 16), 2.0)
    train, regularization = draw(fitted), Regularization(kind)
    state = of(train, torch.float32)
    gaussian = factorise(state, regularization.scale(fitted), regularization.offset(pool(state)))
    left_out = leave_one_out_squared_distances(gaussian, train, fitted, regularization)
    calibration = calibrated(scores(left_out))
    new = scores(squared_distances(gaussian, draw(fresh)))
    return [(new > calibration.threshold(alpha)).mean() for alpha in alphas]


@pytest.mark.parametrize("kind", ["shrink", "paper"])
def test_good_images_are_flagged_at_the_rate_that_was_asked_for(kind):
    """1,000 fresh images, within the binomial 99 % interval of each rate."""
    alphas = (0.01, 0.05, 0.1)
    rng = np.random.default_rng(1)
    for alpha, share in zip(alphas, flagged_share(kind, rng, 4999, 1000, alphas), strict=True):
        low, high = stats.binom(1000, alpha).interval(0.99)
        assert low <= 1000 * share <= high


@pytest.mark.parametrize("kind", ["shrink", "paper"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), fitted=st.integers(10, 60))
def test_few_training_images_give_the_rate_that_their_ranks_do(kind, seed, fitted):
    """Ranks are uniform whatever the number of images: shares follow a beta distribution.

    Few images are where plain training scores would be far too low. Bounds are those that one in
    a million draws would cross.
    """
    rng = np.random.default_rng(seed)
    above = max(1, (fitted + 1) // 5)
    (share,) = flagged_share(kind, rng, fitted, 1000, [above / (fitted + 1)])
    expected = stats.betabinom(1000, above, fitted + 1 - above)
    assert expected.ppf(1e-6) <= 1000 * share <= expected.ppf(1 - 1e-6)
