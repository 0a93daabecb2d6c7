"""One Gaussian for all cells, compared with a dense float64 fit to all cells' embeddings."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian import Regularization
from padim_ray.densities.shared import SharedDensity
from padim_ray.errors import ModelError
from padim_ray.features.grid import PatchGrid
from padim_ray.features.workers import Workers
from tests.densities.test_moments import SEEDS, merge_all, moments_of
from tests.helpers import dense
from tests.helpers.features import grids, nest, random_features

KINDS = ("shrink", "paper")


def dense_fit(features, kind):
    """Mean (D,) and covariance (D, D) of all cells' embeddings, float64."""
    vectors = dense.embeddings(features)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    covariance = np.cov(vectors, rowvar=False).reshape(vectors.shape[1], -1)
    if kind == "paper":
        return vectors.mean(0), covariance + 0.01 * np.eye(len(covariance))
    starts = np.cumsum([0, *(level.shape[1] for level in features)])
    ridge = np.concatenate(
        [
            np.full(stop - start, 0.01 * np.diag(covariance)[start:stop].mean())
            for start, stop in pairwise(starts)
        ]
    )
    return vectors.mean(0), covariance + np.diag(ridge)


def dense_distances(fitted, scored, kind):
    """Mahalanobis distances (B, H, W)."""
    mean, covariance = dense_fit(fitted, kind)
    offsets = dense.embeddings(scored) - mean
    squared = np.einsum("hwbi,ij,hwbj->bhw", offsets, np.linalg.inv(covariance), offsets)
    return squared**0.5


def embed(grid, features):
    return grid.nest([torch.from_numpy(level) for level in features])


def fit(density, grid, features, parts=1):
    """As the pipelines fit: partial sums in float32, merged in float64, pooled by runs of cells."""
    patches = nest(grid, features)
    pieces = zip(*(level.tensor_split(parts, -1) for level in patches), strict=True)
    statistics = merge_all(
        [moments_of(piece, torch.float32) for piece in pieces if piece[0].shape[-1]]
    )
    middle = max(1, grid.cells[-1] // 2)
    runs = {(0, middle), (middle, grid.cells[-1])} - {(middle, middle)}
    first, *others = [density.pool(statistics.cells(*run)) for run in sorted(runs)]
    return density.fit(statistics.cells(0, middle), sum(others, first))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(grids(), SEEDS, st.integers(2, 30), st.integers(1, 3))
def test_mean_and_covariance_are_those_of_all_cells_embeddings(kind, grid, seed, count, parts):
    features = random_features(grid, count, np.random.default_rng(seed))
    density = SharedDensity(Regularization(kind))
    fitted = fit(density, grid, features, parts)
    mean, covariance = dense_fit(features, kind)
    np.testing.assert_allclose(fitted.mean, mean, rtol=1e-6, atol=1e-7)
    whitening = fitted.whitening.double().numpy()
    np.testing.assert_allclose(
        whitening.T @ whitening @ covariance, np.eye(len(mean)), atol=2e-4
    )  # in float32, as it is kept
    statistics = merge_all([moments_of(nest(grid, features))])
    pooled = density.pool(statistics)
    exact = density._covariance(pooled.scatter, pooled.embeddings, pooled.channels)
    np.testing.assert_allclose(exact, covariance, rtol=1e-6, atol=1e-6 * np.abs(covariance).max())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(grids(), SEEDS, st.integers(2, 30))
def test_distances_equal_the_dense_ones(kind, grid, seed, count):
    rng = np.random.default_rng(seed)
    train, test = random_features(grid, count, rng), random_features(grid, 3, rng)
    density = SharedDensity(Regularization(kind))
    distances = density.distances(fit(density, grid, train), embed(grid, test))
    expected = dense_distances(train, test, kind)
    np.testing.assert_allclose(grid.unnest(distances), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(grids(), SEEDS, st.integers(3, 20))
def test_leave_one_out_distances_are_those_of_refitting(kind, grid, seed, count):
    features = random_features(grid, count, np.random.default_rng(seed))
    density = SharedDensity(Regularization(kind))
    fitted = fit(density, grid, features)
    distances = density.distances(
        fitted, embed(grid, features), left_out_of=count, workers=Workers()
    )
    for image in (0, count - 1):
        others = [np.delete(level, image, axis=0) for level in features]
        alone = [level[image : image + 1] for level in features]
        expected = dense_distances(others, alone, kind)[0]
        np.testing.assert_allclose(grid.unnest(distances)[image], expected, rtol=1e-3)


def test_a_bright_image_is_compared_with_the_others_only():
    """Its P embeddings are a large share of what the Gaussian is fitted to."""
    grid = PatchGrid(((8, 8), (4, 4)), (5, 7))
    features = random_features(grid, 6, np.random.default_rng(0))
    features = [level.copy() for level in features]
    for level in features:
        level[2] *= 3
    density = SharedDensity(Regularization())
    fitted, embeddings = fit(density, grid, features), embed(grid, features)
    plain = density.distances(fitted, embeddings)
    left_out = density.distances(fitted, embeddings, left_out_of=6)
    others = [np.delete(level, 2, axis=0) for level in features]
    expected = dense_distances(others, [level[2:3] for level in features], "shrink")[0]
    np.testing.assert_allclose(grid.unnest(left_out)[2], expected, rtol=1e-3)
    assert left_out[:, 2].max() > 2 * plain[:, 2].max()


@given(grids(), SEEDS)
def test_a_saved_density_gives_the_same_distances(grid, seed):
    features = random_features(grid, 5, np.random.default_rng(seed))
    density = SharedDensity(Regularization())
    kept = fit(density, grid, features)
    packed = kept.packed()
    like = density.empty_fitted(grid, "meta").packed()
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {
        n: (t.shape, t.dtype) for n, t in like.items()
    }
    embeddings = embed(grid, [level[:2] for level in features])
    for left_out_of in (None, 5):
        assert torch.equal(
            density.distances(kept, embeddings, left_out_of=left_out_of),
            density.distances(density.unpack_fitted(packed), embeddings, left_out_of=left_out_of),
        )


def test_distances_do_not_depend_on_the_number_of_threads():
    grid = PatchGrid(((8, 8), (4, 4)), (3, 5))
    rng = np.random.default_rng(0)
    density = SharedDensity(Regularization())
    fitted = fit(density, grid, random_features(grid, 20, rng))
    embeddings = embed(grid, random_features(grid, 7, rng))
    threads = torch.get_num_threads()
    for left_out_of in (None, 20):
        one = density.distances(fitted, embeddings, left_out_of=left_out_of)
        three = density.distances(fitted, embeddings, left_out_of=left_out_of, workers=Workers(3))
        torch.testing.assert_close(one, three, rtol=1e-5, atol=0)
    torch.set_num_threads(threads)


def test_images_that_do_not_differ_are_refused():
    same = torch.ones(4, 3, 5)
    with pytest.raises(ModelError, match="non-positive pivot"):
        density = SharedDensity(Regularization())
        density.fit(moments_of([same]), density.pool(moments_of([same])))


def test_pooled_moments_of_other_images_do_not_add_up():
    density = SharedDensity(Regularization())
    with pytest.raises(ValueError, match="3 and of 4 images"):
        density.pool(moments_of([torch.rand(4, 2, 3)])) + density.pool(
            moments_of([torch.rand(4, 2, 4)])
        )
