"""Cells compared with averages written out in float64, and with the Gaussians on top of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray import ModelError
from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.features.cells import average_cells, cell_grids
from padim_ray.features.grid import PatchGrid
from tests.helpers import dense
from tests.helpers.dense import averaged

STRIDES = ((4,), (8,), (4, 8), (8, 16), (4, 8, 16), (4, 16, 32), (8, 16, 32))
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def layouts(draw):
    """The input's size, the levels' strides, the cells' stride, and the neighbourhood."""
    strides = draw(st.sampled_from(STRIDES))
    stride = draw(st.sampled_from([4, 8, 16, 32]))
    largest = max(stride, *strides)
    size = tuple(draw(st.integers(1, 3)) * largest for _ in range(2))
    return size, strides, stride, draw(st.sampled_from([1, 3, 5]))


def random_maps(size, strides, images, rng):
    return [
        rng.gamma(1.5, size=(images, int(rng.integers(1, 7)), size[0] // s, size[1] // s)).astype(
            np.float32
        )
        for s in strides
    ]


def as_features(maps):
    return [torch.from_numpy(level).to(memory_format=torch.channels_last) for level in maps]


@settings(max_examples=60)
@given(layouts(), seeds)
def test_features_are_averaged_over_neighbourhoods_and_cells(layout, rng):
    size, strides, stride, neighbourhood = layout
    maps = random_maps(size, strides, 2, rng)
    grids = cell_grids(size, strides, stride)
    found = average_cells(as_features(maps), grids, neighbourhood)
    for level, grid, own in zip(found, grids, maps, strict=True):
        expected = averaged(own, *grid, neighbourhood)
        np.testing.assert_allclose(level.numpy(), expected, rtol=2e-6, atol=1e-6)


@settings(max_examples=30)
@given(layouts(), seeds)
def test_bfloat16_features_are_averaged_in_float32(layout, rng):
    size, strides, stride, neighbourhood = layout
    maps = random_maps(size, strides, 2, rng)
    features = [level.bfloat16() for level in as_features(maps)]
    grids = cell_grids(size, strides, stride)
    found = average_cells(features, grids, neighbourhood)
    for level, grid, own in zip(found, grids, features, strict=True):
        assert level.dtype == torch.bfloat16
        expected = averaged(own.float().numpy(), *grid, neighbourhood)
        np.testing.assert_allclose(level.float(), expected, rtol=2**-7)  # rounded twice at most


@settings(max_examples=40)
@given(layouts(), st.sampled_from(["shrink", "paper"]), seeds)
def test_distances_of_cells_equal_those_of_dense_gaussians(layout, kind, rng):
    size, strides, stride, neighbourhood = layout
    grids = cell_grids(size, strides, stride)
    train = random_maps(size, strides, 9, rng)
    channels = tuple(level.shape[1] for level in train)
    test = [rng.gamma(1.5, size=(2, *level.shape[1:])).astype(np.float32) for level in train]
    grid, density = PatchGrid(grids, channels), GaussianDensity(Regularization(kind))

    def embed(maps):
        return grid.nest(average_cells(as_features(maps), grids, neighbourhood))

    moments = density.empty(grid).add_(embed(train)).double()
    fitted = density.fit(moments, density.pool(moments))
    distances = grid.unnest(density.distances(fitted, embed(test)))
    reference = [
        [averaged(level, *cells, neighbourhood) for level, cells in zip(maps, grids, strict=True)]
        for maps in (train, test)
    ]
    expected = np.sqrt(dense.squared_distances(*reference, kind))
    np.testing.assert_allclose(distances, expected, rtol=2e-4)


@given(layouts())
def test_grids_are_multiples_of_the_next(layout):
    size, strides, stride, _ = layout
    grids = cell_grids(size, strides, stride)
    for (height, width), own in zip(grids, strides, strict=True):
        assert (height, width) == (size[0] // max(own, stride), size[1] // max(own, stride))
    for fine, coarse in pairwise(grids):
        assert fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0


@pytest.mark.parametrize(
    ("size", "strides", "stride", "sentence"),
    [
        ((96, 96), (4, 8, 16), 12, r"A cell of 12 pixels .* \(4, 8, 16\) .*; use 8 or 16"),
        ((96, 96), (4, 8, 16), 24, r"; use 16 or 32"),
        ((96, 96), (4, 8, 16), 0, r"; use 1$"),
        (
            (96, 100),
            (4, 8),
            32,
            r"96×100 .* of 32, the cells' stride; instead of 100 use 96 or 128",
        ),
        ((90, 96), (4, 8, 16), 4, r"the deepest layer's stride; instead of 90 use 80 or 96"),
        ((16, 64), (4, 8), 32, r"instead of 16 use 32"),
    ],
)
def test_cells_that_do_not_fit_are_refused_with_the_nearest_that_do(
    size, strides, stride, sentence
):
    with pytest.raises(ModelError, match=sentence):
        cell_grids(size, strides, stride)
