"""Histograms of positive floats with one fixed set of bins, so that they merge by addition.

A bin is the values that share a float32's sign, exponent and first 10 bits of mantissa: 1,024 bins
for every doubling, so narrow that what is computed from the counts (quantiles, areas under curves)
is as good as from the values. Finding the bin is a shift of the value's bits.
"""

import numpy as np

MANTISSA_BITS = 10
_SHIFT = 23 - MANTISSA_BITS  # of a float32's 23
_FIRST, _LAST = (int(np.float32(value).view(np.int32)) >> _SHIFT for value in (2.0**-10, 2.0**20))
BINS = _LAST - _FIRST
"""Values below 2⁻¹⁰ (negative ones too) are counted in the first bin, from 2²⁰ on in the last."""


def bin_indices(values: np.ndarray) -> np.ndarray:
    """The bin of each value, int32 in 0…BINS−1, ascending with the values; NaN is not allowed."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    return ((bits >> _SHIFT) - _FIRST).clip(0, BINS - 1)


def count_values(values: np.ndarray) -> np.ndarray:
    """The number of values in each bin: any shape → (BINS,) int64."""
    return np.bincount(bin_indices(values).ravel(), minlength=BINS)


def bin_edges() -> np.ndarray:
    """The bins' edges, (BINS + 1,) float32: bin i holds edges[i] ≤ value < edges[i + 1]."""
    return (np.arange(_FIRST, _LAST + 1, dtype=np.int32) << _SHIFT).view(np.float32)
