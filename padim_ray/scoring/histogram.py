"""Histograms of positive floats in a fixed set of bins, so that they merge by addition.

All float32 values with the same sign, exponent and first 10 bits of mantissa share a bin, which
makes 1,024 bins per doubling. Bins are so narrow that quantiles and areas under curves from the
counts are as good as from the values. A bit shift maps a value to its bin.
"""

import numpy as np

_MANTISSA_BITS = 10
_SHIFT = 23 - _MANTISSA_BITS  # a float32 has 23 bits of mantissa
_FIRST, _LAST = (int(np.float32(value).view(np.int32)) >> _SHIFT for value in (2.0**-10, 2.0**20))
BINS = _LAST - _FIRST
"""Number of bins. The first also counts values below 2⁻¹⁰, negative ones too, the last from 2²⁰."""


def bin_indices(values: np.ndarray) -> np.ndarray:
    """The bin of each value, int32 from 0 to BINS − 1, same shape; NaN is not allowed."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    return ((bits >> _SHIFT) - _FIRST).clip(0, BINS - 1)


def count_values(values: np.ndarray) -> np.ndarray:
    """The number of values in each bin: any shape → (BINS,) int64."""
    return np.bincount(bin_indices(values).ravel(), minlength=BINS)


def bin_edges() -> np.ndarray:
    """The bin edges, (BINS + 1,) float32: bin i holds edges[i] ≤ value < edges[i + 1]."""
    return (np.arange(_FIRST, _LAST + 1, dtype=np.int32) << _SHIFT).view(np.float32)
