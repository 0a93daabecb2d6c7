import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from padim_ray.densities.gaussian.leave_one_out import leave_one_out_squared_distances
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import factorise, squared_distances
from padim_ray.errors import ModelError
from padim_ray.features.grid import PatchGrid
from padim_ray.scoring import threshold
from padim_ray.scoring.anomaly_map import AnomalyMapper, image_scores
from padim_ray.scoring.calibration import Calibration, count_pixels, read_scores
from padim_ray.scoring.histogram import BINS, bin_edges, count_values
from tests.densities.test_moments import moments_of
from tests.helpers.features import nest

SCORES = st.lists(st.floats(0.125, 1000, width=32), min_size=1, max_size=300)


def calibrated(scores):
    return Calibration(np.sort(np.array(scores, np.float32)), np.zeros(BINS, np.int64))


@given(SCORES, st.integers(0, 2**32), st.sampled_from([0.01, 0.1, 0.4]))
def test_a_calibration_judges_by_its_own_scores_and_pixels(reference, seed, alpha):
    values = np.random.default_rng(seed).gamma(5, 2, 1000).astype(np.float32)
    scores = np.sort(np.array(reference, np.float32))
    calibration = Calibration(scores, count_values(values))
    assert calibration.reaches(alpha) == threshold.reaches(len(scores), alpha)
    assert calibration.threshold(alpha) == threshold.conformal_threshold(scores, alpha)
    expected = threshold.pixel_threshold(count_values(values), alpha)
    assert calibration.pixel_threshold(alpha) == expected
    np.testing.assert_array_equal(calibration.p_values(values), threshold.p_values(values, scores))


@given(SCORES)
def test_stored_scores_come_back(scores):
    scores = np.sort(np.array(scores, np.float32))
    np.testing.assert_array_equal(read_scores(scores), scores)


@pytest.mark.parametrize("scores", [[2, 1], [-1, 1], [1, np.inf], [np.nan], [1, np.nan, 2]])
def test_scores_that_can_not_be_are_refused(scores):
    with pytest.raises(ModelError, match="ascending"):
        read_scores(np.array(scores, np.float32))


@given(st.integers(0, 2**32))
def test_a_stored_histogram_comes_back(seed):
    counts = count_values(np.random.default_rng(seed).gamma(5, 2, 200).astype(np.float32))
    bins = np.flatnonzero(counts)
    read = count_pixels(bin_edges()[bins], counts[bins], 200)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, counts)


@pytest.mark.parametrize(
    ("bins", "counts", "message"),
    [
        ([9, 5], [1, 1], "ascending bin edges"),
        ([5, 5], [1, 1], "ascending bin edges"),
        ([5, 9], [1, 2], "2 pixels"),
        ([5, 9], [3, -1], "2 pixels"),
        ([5, 9], [2, 0], "2 pixels"),
        ([5, 9], [2**62 + 1, 2**62 + 1], "2 pixels"),
    ],
)
def test_a_histogram_that_can_not_be_is_refused(bins, counts, message):
    with pytest.raises(ModelError, match=message):
        count_pixels(bin_edges()[bins], np.array(counts), 2)


@pytest.mark.parametrize("value", [1.0001, np.nan, np.inf, -1.0, 2.0**20])
def test_values_that_are_no_bin_edges_are_refused(value):
    with pytest.raises(ModelError, match="bin edges"):
        count_pixels(np.array([value], np.float32), np.array([1]), 1)


def test_samples_add_up():
    values = np.random.default_rng(0).gamma(5, 2, 100).astype(np.float32)
    parts = [Calibration(np.sort(x), count_values(x)) for x in (values[:30], values[30:])]
    both = parts[0] + parts[1]
    np.testing.assert_array_equal(both.scores, np.sort(values))
    np.testing.assert_array_equal(both.pixels, count_values(values))


def flagged_share(kind, rng, fitted, fresh, alphas, score_share):
    """The share of fresh good images, with Gaussian features, that is flagged at each alpha."""
    grid = PatchGrid(((4, 4), (2, 2)), (3, 5))
    mixing = [rng.normal(0, 0.2, (channels, channels)) for channels in grid.channels]

    def draw(images):
        levels = [
            1 + rng.normal(size=(images, *cells, len(mix))) @ mix
            for cells, mix in zip(grid.grids, mixing, strict=True)
        ]
        return nest(grid, [level.transpose(0, 3, 1, 2).astype(np.float32) for level in levels])

    def scores(squared):
        distances = grid.unnest(squared).sqrt()
        return image_scores(distances, mapper.maps(distances), score_share).numpy()

    mapper = AnomalyMapper((4, 4), (16, 16), 2.0)
    train, regularization = draw(fitted), Regularization(kind)
    state = moments_of(train, torch.float32)
    gaussian = factorise(state, regularization.scale(fitted), regularization.offset(pool(state)))
    left_out = leave_one_out_squared_distances(gaussian, train, fitted, regularization)
    calibration = calibrated(scores(left_out))
    new = scores(squared_distances(gaussian, draw(fresh)))
    return [(new > calibration.threshold(alpha)).mean() for alpha in alphas]


@pytest.mark.parametrize("kind", ["shrink", "paper"])
def test_good_images_are_flagged_at_the_rate_that_was_asked_for(kind):
    """The share of 1,000 fresh images lies in the binomial 99 % interval of each rate."""
    alphas = (0.01, 0.05, 0.1)
    rng = np.random.default_rng(1)
    shares = flagged_share(kind, rng, 4999, 1000, alphas, score_share=0)
    for alpha, share in zip(alphas, shares, strict=True):
        low, high = stats.binom(1000, alpha).interval(0.99)
        assert low <= 1000 * share <= high


@pytest.mark.parametrize("kind", ["shrink", "paper"])
@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(10, 60), st.sampled_from([0, 0.1]))
def test_few_training_images_give_the_rate_that_their_ranks_do(kind, seed, fitted, score_share):
    """Ranks are uniform for any number of images, so flagged counts are beta-binomial.

    With few images, the training images' own scores would be far too low. One draw in a million
    crosses each bound.
    """
    rng = np.random.default_rng(seed)
    above = max(1, (fitted + 1) // 5)
    (share,) = flagged_share(kind, rng, fitted, 1000, [above / (fitted + 1)], score_share)
    expected = stats.betabinom(1000, above, fitted + 1 - above)
    assert expected.ppf(1e-6) <= 1000 * share <= expected.ppf(1 - 1e-6)
