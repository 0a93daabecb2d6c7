"""Distances to the nearest of several cells' Gaussians, compared with dense ones in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian.leave_one_out import leave_one_out_squared_distances
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.search import squared_distances_to_nearest
from padim_ray.densities.gaussian.whitening import factorise
from padim_ray.densities.search import cells_around, most_distant_after_search
from padim_ray.features.grid import PatchGrid
from tests.densities.test_moments import SEEDS, moments_of
from tests.helpers import dense
from tests.helpers.features import grids, random_features

KINDS = ("shrink", "paper")


def searched(grid, features, scored, kind, radius, left_out_of=None):
    """Distances of all cells of `scored` from the Gaussians of `features`, (images, H, W)."""
    count, regularization = len(features[0]), Regularization(kind)
    fitted_to, embeddings = (
        grid.nest([torch.from_numpy(level) for level in levels]) for levels in (features, scored)
    )
    state = moments_of(fitted_to.patches(), torch.float64)
    gaussian = factorise(state, regularization.scale(count), regularization.offset(pool(state)))
    images = torch.arange(len(embeddings)).repeat_interleave(grid.cells[0])
    cells = torch.arange(grid.cells[0]).repeat(len(embeddings))
    squared = squared_distances_to_nearest(
        *(gaussian, embeddings, images, cells, cells_around(grid, radius)[cells]),
        *(left_out_of, regularization),
    )
    return grid.unnest(squared.view(len(embeddings), -1).T).sqrt().numpy()


def expected(features, scored, kind, radius):
    """The same, position by position."""
    train, test = dense.embeddings(features), dense.embeddings(scored)
    precision = np.linalg.inv(
        dense.covariances(train, [level.shape[1] for level in features], kind)
    )
    mean = train.mean(2)
    height, width, images, _ = test.shape
    nearest = np.full((images, height, width), np.inf)
    for y, x in np.ndindex(height, width):
        for v in range(max(0, y - radius), min(height, y + radius + 1)):
            for u in range(max(0, x - radius), min(width, x + radius + 1)):
                offset = test[y, x] - mean[v, u]
                squared = np.einsum("bi,ij,bj->b", offset, precision[v, u], offset)
                nearest[:, y, x] = np.minimum(nearest[:, y, x], squared)
    return nearest**0.5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(grids(), SEEDS, st.integers(5, 30), st.integers(0, 2))
def test_the_nearest_gaussian_within_the_radius_counts(kind, grid, seed, count, radius):
    rng = np.random.default_rng(seed)
    features, scored = random_features(grid, count, rng), random_features(grid, 2, rng)
    found = searched(grid, features, scored, kind, radius)
    np.testing.assert_allclose(found, expected(features, scored, kind, radius), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(grids(), SEEDS, st.integers(6, 40), st.integers(1, 2))
def test_distances_are_those_of_refitting_without_the_image(kind, grid, seed, count, radius):
    features = random_features(grid, count, np.random.default_rng(seed))
    image = seed % count
    alone = [level[image : image + 1] for level in features]
    others = [np.delete(level, image, axis=0) for level in features]
    found = searched(grid, features, alone, kind, radius, left_out_of=count)
    tolerance = 1e-3 if kind == "paper" else 0.01
    np.testing.assert_allclose(found, expected(others, alone, kind, radius), rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_of_zero_is_leaving_one_out(kind):
    rng = np.random.default_rng(0)
    grid = PatchGrid(((8, 8), (4, 4)), (3, 5))
    features = random_features(grid, 12, rng)
    found = searched(grid, features, features, kind, 0, left_out_of=12)
    state = moments_of(grid.nest([torch.from_numpy(f) for f in features]).patches(), torch.float64)
    rule = Regularization(kind)
    gaussian = factorise(state, rule.scale(12), rule.offset(pool(state)))
    patches = grid.nest([torch.from_numpy(level) for level in features]).patches()
    squared = leave_one_out_squared_distances(gaussian, patches, 12, rule)
    np.testing.assert_allclose(found, grid.unnest(squared).sqrt().numpy(), rtol=5e-3)


@given(SEEDS, st.integers(1, 5), st.integers(1, 60), st.data())
def test_only_the_cells_that_can_matter_are_searched(seed, images, cells, data):
    count = data.draw(st.integers(1, cells))
    rng = np.random.default_rng(seed)
    before = torch.from_numpy(rng.uniform(0, 10, (images, cells)))
    after = before * torch.from_numpy(rng.uniform(0.3, 1, (images, cells)))
    searched = torch.zeros(images, cells, dtype=torch.int64)

    def search(rows, columns):
        searched[rows, columns] += 1
        return after[rows, columns]

    found = most_distant_after_search(before, count, search)
    expected = after.topk(count).values
    torch.testing.assert_close(found.sort(descending=True).values, expected, rtol=0, atol=0)
    assert searched.max() <= 1
    # no cell twice; and of those that can't matter, fewer than of the others
    needed = (before >= expected[:, -1:]).sum(1)
    assert (searched.sum(1) <= torch.maximum(2 * needed, torch.tensor(2 * count))).all()
