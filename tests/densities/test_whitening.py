import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian.moments import Moments
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import (
    Gaussian,
    concatenate,
    factorise,
    squared_distances,
)
from padim_ray.errors import ModelError
from padim_ray.features.grid import PatchGrid
from tests.densities.test_moments import SEEDS, merge_all, moments_of
from tests.helpers import dense
from tests.helpers.features import grids, nest, random_features

KINDS = ("shrink", "paper")


def fitted(state, kind="shrink", **settings):
    regularization = Regularization(kind, **settings)
    return factorise(state, regularization.scale(state.count), regularization.offset(pool(state)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(grids(), SEEDS, st.integers(2, 60))
def test_distances_equal_the_dense_ones(kind, grid, seed, count):
    """In float32 from partial sums to distances; most draws have fewer images than channels."""
    rng = np.random.default_rng(seed)
    train, test = random_features(grid, count, rng), random_features(grid, 3, rng)
    patches = nest(grid, train)
    halves = [[x[..., : count // 2] for x in patches], [x[..., count // 2 :] for x in patches]]
    parts = [moments_of(half, torch.float32) for half in halves if half[0].shape[-1]]
    distances = squared_distances(fitted(merge_all(parts), kind), nest(grid, test))
    assert distances.dtype == torch.float32
    expected = dense.squared_distances(train, test, kind)
    np.testing.assert_allclose(grid.unnest(distances).numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_equal_the_dense_ones_with_many_channels(kind):
    grid = PatchGrid(((8, 8), (4, 4), (2, 2)), (16, 32, 64))
    rng = np.random.default_rng(3)
    train, test = random_features(grid, 40, rng), random_features(grid, 4, rng)
    distances = squared_distances(
        fitted(merge_all([moments_of(nest(grid, train), torch.float32)]), kind), nest(grid, test)
    )
    expected = dense.squared_distances(train, test, kind)
    np.testing.assert_allclose(grid.unnest(distances).numpy(), expected, rtol=1e-5)


@given(grids(), SEEDS)
def test_shards_of_cells_factorise_like_the_whole(grid, seed):
    state = moments_of(nest(grid, random_features(grid, 9, np.random.default_rng(seed))))
    whole = fitted(state)
    middle = max(1, grid.cells[-1] // 2)
    runs = [(0, middle), (middle, grid.cells[-1])] if middle < grid.cells[-1] else [(0, middle)]
    parts = [state.cells(*run) for run in runs]
    pooled = pool(parts[0])
    for part in parts[1:]:
        pooled = pooled + pool(part)
    regularization = Regularization()
    offset, scale = regularization.offset(pooled), regularization.scale(state.count)
    joined = concatenate([factorise(part, scale, offset) for part in parts])
    for row, same_row in zip(whole.whitening, joined.whitening, strict=True):
        for block, same in zip(row, same_row, strict=True):
            torch.testing.assert_close(block, same, rtol=1e-5, atol=1e-6)


@given(grids(), SEEDS)
def test_saved_gaussians_come_back_identical(grid, seed):
    kept = fitted(moments_of(nest(grid, random_features(grid, 9, np.random.default_rng(seed)))))
    back = Gaussian.of_packed(kept.packed())
    patches = nest(grid, random_features(grid, 2, np.random.default_rng(seed + 1)))
    assert torch.equal(squared_distances(kept, patches), squared_distances(back, patches))


def test_a_level_without_channels_is_allowed():
    grid = PatchGrid(((4, 4), (2, 2)), (3, 0))
    rng = np.random.default_rng(0)
    train, test = random_features(grid, 9, rng), random_features(grid, 2, rng)
    distances = squared_distances(fitted(moments_of(nest(grid, train))), nest(grid, test))
    expected = dense.squared_distances(train[:1], test[:1], "shrink")
    np.testing.assert_allclose(grid.unnest(distances).numpy(), expected, rtol=1e-5)


def test_one_image_is_too_few():
    state = moments_of([torch.rand(4, 3, 1)])
    with pytest.raises(ModelError, match="1 readable image, and a fit needs at least 2"):
        factorise(state, 1.0, Regularization().offset(pool(moments_of([torch.rand(4, 3, 2)]))))


def test_images_that_do_not_differ_have_no_covariance():
    same = torch.ones(4, 3, 5)
    with pytest.raises(ModelError, match="non-positive pivot in 4 of 4 covariances of level 0"):
        fitted(moments_of([same]))


def test_infinite_moments_are_refused():
    state = moments_of([torch.rand(4, 3, 5)])
    infinite = Moments(5, state.means, tuple((row[0] * float("inf"),) for row in state.scatters))
    with pytest.raises(ModelError, match="NaN or infinite moments at level 0"):
        fitted(infinite, "paper")
