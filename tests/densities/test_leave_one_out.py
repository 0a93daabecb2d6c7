import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian import leave_one_out
from padim_ray.densities.gaussian.leave_one_out import (
    NEGLIGIBLE_FROM,
    leave_one_out_squared_distances,
)
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import factorise
from padim_ray.features.grid import PatchGrid
from tests.densities.test_moments import SEEDS, merge_all, moments_of
from tests.helpers import dense
from tests.helpers.features import grids, nest, random_features

KINDS = ("shrink", "paper")


def left_out(grid, features, kind, dtype=torch.float32, **how):
    """Leave-one-out distances of all images, (images, H, W)."""
    count, regularization = len(features[0]), Regularization(kind)
    patches = [level.to(dtype) for level in nest(grid, features)]
    state = merge_all([moments_of(patches, dtype)])
    offset, scale = regularization.offset(pool(state)), regularization.scale(count)
    gaussian = factorise(state, scale, offset, dtype=dtype)
    squared = leave_one_out_squared_distances(gaussian, patches, count, regularization, **how)
    return grid.unnest(squared).sqrt().numpy()


def refitted(features, image, kind):
    """The dense distances (H, W) of an image to the Gaussians of all others."""
    others = [np.delete(level, image, axis=0) for level in features]
    alone = [level[image : image + 1] for level in features]
    return dense.squared_distances(others, alone, kind)[0] ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(grids(), SEEDS, st.integers(6, 60))
def test_distances_are_those_of_refitting_without_the_image(kind, grid, seed, count):
    """With fewer and with more images than channels, at one to three levels."""
    features = random_features(grid, count, np.random.default_rng(seed))
    distances = left_out(grid, features, kind)
    tolerance = 1e-4 if kind == "paper" else 0.01
    for image in (0, count - 1):
        expected = refitted(features, image, kind)
        np.testing.assert_allclose(distances[image], expected, rtol=tolerance)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([6, 12, 28, 33, 60, 150]))
def test_images_with_lighting_of_their_own_are_left_out_exactly(seed, count):
    """Lighting changes all cells of an image alike, so the image has a large share in R."""
    rng = np.random.default_rng(seed)
    grid = PatchGrid(((8, 8), (4, 4), (2, 2)), (6, 10, 14))
    features = random_features(grid, count, rng)
    light = rng.uniform(0.6, 1.4, (count, 1, 1, 1)).astype(np.float32)
    features = [
        level * light + 0.3 * rng.normal(size=(count, level.shape[1], 1, 1)).astype(np.float32)
        for level in features
    ]
    distances = left_out(grid, features, "shrink")
    for image in (0, int(light.argmax())):
        expected = refitted(features, image, "shrink")
        np.testing.assert_allclose(distances[image], expected, rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(grids(), SEEDS, st.integers(3, 20))
def test_enough_steps_give_the_exact_distances(kind, grid, seed, count):
    """Also with `shrink`, where R depends on every image."""
    features = random_features(grid, count, np.random.default_rng(seed))
    distances = left_out(grid, features, kind, torch.float64, tolerance=0, max_steps=60)
    np.testing.assert_allclose(distances[0], refitted(features, 0, kind), rtol=1e-6)


def test_one_of_many_images_hardly_changes_the_regularisation():
    grid = PatchGrid(((8, 8), (4, 4), (2, 2)), (6, 10, 14))
    features = random_features(grid, NEGLIGIBLE_FROM, np.random.default_rng(0))
    distances = left_out(grid, features, "shrink")
    for image in range(3):
        np.testing.assert_allclose(
            distances[image], refitted(features, image, "shrink"), rtol=0.005
        )


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_and_runs_of_cells_give_the_same_distances(kind, monkeypatch):
    grid = PatchGrid(((8, 8), (4, 4), (2, 2)), (3, 5, 9))
    features = random_features(grid, 13, np.random.default_rng(0))
    at_once = left_out(grid, features, kind)
    monkeypatch.setattr(leave_one_out, "MAX_CORRECTION_ELEMENTS", 17**2 * 5)
    monkeypatch.setattr(leave_one_out, "MAX_FIELD_ELEMENTS", 1000)
    np.testing.assert_allclose(left_out(grid, features, kind), at_once, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_the_mean_has_distance_zero(kind):
    grid = PatchGrid(((4, 4), (2, 2)), (3, 5))
    features = random_features(grid, 11, np.random.default_rng(0))
    for level in features:
        level[0] = level[1:].mean(0)
    distances = left_out(grid, features, kind, torch.float64)
    np.testing.assert_allclose(distances[0], 0, atol=1e-5)


def test_distances_stay_finite_without_regularisation():
    """One image may be all the variance in a direction; without it the covariance is singular."""
    grid, regularization = PatchGrid(((4, 4),), (3,)), Regularization("paper", epsilon=0)
    features = random_features(grid, 4, np.random.default_rng(0))
    patches = nest(grid, features)
    state = merge_all([moments_of(patches, torch.float32)])
    gaussian = factorise(state, regularization.scale(4), regularization.offset(pool(state)))
    squared = leave_one_out_squared_distances(gaussian, patches, 4, regularization)
    assert torch.isfinite(squared).all()
    assert (squared > 1e4).all()


def test_two_images_are_too_few():
    grid = PatchGrid(((4, 4),), (3,))
    with pytest.raises(ValueError, match="leaving one of 2 images out"):
        left_out(grid, random_features(grid, 2, np.random.default_rng(0)), "shrink")
