"""Thresholds and p-values, against definitions written out as plain loops."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.scoring.histogram import bin_edges, count_values
from padim_ray.scoring.threshold import (
    conformal_threshold,
    is_flagged,
    min_images,
    p_values,
    pixel_threshold,
    reaches,
)

SCORES = st.lists(st.floats(0.125, 1000, width=32), min_size=1, max_size=300)


def ascending(scores):
    return np.sort(np.array(scores, np.float32))


@given(SCORES, SCORES)
def test_p_values_count_the_scores_that_are_not_lower(reference, new):
    expected = [(1 + sum(r >= x for r in reference)) / (len(reference) + 1) for x in new]
    np.testing.assert_allclose(p_values(np.array(new, np.float32), ascending(reference)), expected)


def test_failed_images_have_no_p_value():
    p = p_values(np.array([np.nan, 1.5], np.float32), ascending([1, 2]))
    assert np.isnan(p).tolist() == [True, False]


@given(st.sets(st.floats(0.125, 1000, width=32), min_size=1, max_size=300), SCORES, st.data())
def test_a_score_is_above_the_threshold_exactly_if_its_p_value_is_at_most_alpha(
    reference, new, data
):
    reference = ascending(list(reference))
    lowest = 1 / (len(reference) + 1)
    alpha = data.draw(st.floats(lowest, 0.5) if lowest < 0.5 else st.just(0.5))
    assert reaches(len(reference), alpha)
    scores = np.array(new, np.float32)
    p = p_values(scores, reference)
    is_decided = np.abs(p - alpha) > 1e-8  # not by rounding
    flagged = is_flagged(scores, conformal_threshold(reference, alpha))
    np.testing.assert_array_equal(flagged[is_decided], (p <= alpha)[is_decided])


@given(st.integers(1, 3000), st.integers(1, 500))
def test_the_threshold_is_the_conformal_quantile(images, permille):
    alpha = Fraction(permille, 1000)
    rank = min(math.ceil((images + 1) * (1 - alpha)), images)
    assert conformal_threshold(np.arange(images) + 1.0, float(alpha)) == rank


@given(st.integers(1, 3000), st.integers(1, 999))
def test_alpha_is_reached_from_its_inverse_on(images, permille):
    alpha = Fraction(permille, 1000)
    assert reaches(images, float(alpha)) == (images + 1 >= 1 / alpha)
    assert min_images(float(alpha)) == math.ceil(1 / alpha) - 1


def test_with_too_few_images_the_threshold_is_the_largest_score():
    few = ascending([3, 1, 2])
    assert reaches(3, 0.25) and not reaches(3, 0.24)
    assert conformal_threshold(few, 0.01) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_at_the_threshold_or_without_a_value_is_not_flagged(dtype):
    scores = np.array([0.1, np.nan, 0.2], dtype)
    assert is_flagged(scores, 0.1).tolist() == [False, False, True]


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.01, 0.05, 0.5]))
def test_the_pixel_threshold_is_the_smallest_edge_that_few_enough_pixels_reach(seed, alpha):
    values = np.random.default_rng(seed).gamma(5, 2, 10_000).astype(np.float32)
    threshold = pixel_threshold(count_values(values), alpha)
    assert (values >= threshold).mean() <= alpha
    edges = bin_edges()
    below = edges[np.searchsorted(edges, threshold) - 1]
    assert (values >= below).mean() > alpha
