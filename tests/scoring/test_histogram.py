import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from padim_ray.scoring.histogram import BINS, bin_edges, bin_indices, count_values

VALUES = arrays(
    np.float32, array_shapes(max_dims=3), elements=st.floats(2**-10, 2**20 - 1, width=32)
)


@given(VALUES)
def test_counts_equal_numpys(values):
    expected, _ = np.histogram(values, bin_edges())
    np.testing.assert_array_equal(count_values(values), expected)


@given(VALUES, VALUES)
def test_histograms_merge_by_addition(a, b):
    both = np.concatenate([a.ravel(), b.ravel()])
    np.testing.assert_array_equal(count_values(both), count_values(a) + count_values(b))


def test_bins_are_a_thousandth_wide():
    edges = bin_edges().astype(float)
    assert len(edges) == BINS + 1
    assert (np.diff(edges) / edges[:-1]).max() <= 1 / 1024


def test_values_out_of_range_are_counted_at_the_ends():
    outside = np.array([-3.0, -0.0, 0.0, 1e-30, 2.0**20, np.inf], np.float32)
    np.testing.assert_array_equal(bin_indices(outside), [0, 0, 0, 0, BINS - 1, BINS - 1])
