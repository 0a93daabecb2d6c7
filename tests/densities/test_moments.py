from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian.moments import (
    Moments,
    accumulate_,
    empty_moments,
    subtract,
)
from tests.helpers import dense
from tests.helpers.features import grids, nest, random_features

SEEDS = st.integers(0, 2**32 - 1)


def moments_of(patches, dtype=torch.float64):
    cells = [len(level) for level in patches]
    channels = [level.shape[1] for level in patches]
    return accumulate_(
        empty_moments(cells, channels, dtype=dtype), [level.to(dtype) for level in patches]
    )


def merge_all(parts):
    """Merge the moments of all parts as the pipelines do."""
    return reduce(add, (part.double() for part in parts))


def images(patches, indices):
    return [level[..., list(indices)] for level in patches]


def join_moments(parts):
    """The inverse of `Moments.cells` for consecutive runs of cells."""
    return parts[0].like({n: torch.cat([part.named[n] for part in parts]) for n in parts[0].named})


def assert_close(a, b, tolerance):
    """Compare relative to each block's largest entry."""
    assert a.count == b.count
    pairs = [*zip(a.means, b.means, strict=True)]
    for rows in zip(a.scatters, b.scatters, strict=True):
        pairs += zip(*rows, strict=True)
    for x, y in pairs:
        scale = max(float(x.abs().max()), 1e-30)
        assert float((x - y).abs().max()) <= tolerance * scale


@given(grids(), SEEDS, st.integers(2, 9))
def test_blocks_hold_the_dense_scatter(grid, seed, count):
    features = random_features(grid, count, np.random.default_rng(seed))
    state = moments_of(nest(grid, features))
    embedding = dense.embeddings(features)
    offset = embedding - embedding.mean(2, keepdims=True)
    scatter = torch.from_numpy(np.einsum("hwbi,hwbj->hwij", offset, offset)).flatten(0, 1)
    first = np.cumsum([0, *grid.channels])
    for level, row in enumerate(state.scatters):
        spread = grid.cells[0] // grid.cells[level]
        for k, block in enumerate(row, start=level):
            expected = scatter[grid.orders[0]][
                :, first[level] : first[level + 1], first[k] : first[k + 1]
            ]
            torch.testing.assert_close(
                block.repeat_interleave(spread, 0), expected, rtol=1e-10, atol=1e-12
            )


@settings(max_examples=40)
@given(grids(), SEEDS, st.integers(2, 30), st.data())
def test_merging_any_partition_in_any_order_gives_the_same_moments(grid, seed, count, data):
    patches = nest(grid, random_features(grid, count, np.random.default_rng(seed)))
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=6)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    merged = merge_all([moments_of(images(patches, part)) for part in parts])
    assert_close(merged, moments_of(patches), 1e-9)


@given(grids(), SEEDS, st.integers(2, 12), st.integers(2, 12))
def test_accumulating_batch_by_batch_equals_one_batch(grid, seed, first, second):
    patches = nest(grid, random_features(grid, first + second, np.random.default_rng(seed)))
    state = moments_of(images(patches, range(first)))
    state = accumulate_(state, [x.double() for x in images(patches, range(first, first + second))])
    assert_close(state, moments_of(patches), 1e-9)


@given(grids(), SEEDS)
def test_subtracting_is_the_inverse_of_merging(grid, seed):
    patches = nest(grid, random_features(grid, 12, np.random.default_rng(seed)))
    kept, forgotten = (
        moments_of(images(patches, range(8))),
        moments_of(images(patches, range(8, 12))),
    )
    assert_close(subtract(moments_of(patches), forgotten), kept, 1e-9)
    nothing = subtract(kept, kept)
    assert nothing.count == 0
    assert not any(block.any() for row in nothing.scatters for block in row)


def test_subtracting_more_images_than_there_are_is_refused():
    rng = np.random.default_rng(0)
    small, large = (moments_of([torch.from_numpy(rng.random((4, 2, n)))]) for n in (3, 5))
    with pytest.raises(ValueError, match="5 images from 3"):
        subtract(small, large)


@given(grids(), SEEDS)
def test_a_float32_partial_sum_is_exact_to_its_precision(grid, seed):
    patches = nest(grid, random_features(grid, 64, np.random.default_rng(seed)))
    state = empty_moments(grid.cells, grid.channels)
    for start in range(0, 64, 16):
        state = accumulate_(state, images(patches, range(start, start + 16)))
    assert_close(moments_of(patches), state.to(torch.float64), 1e-6)


@given(grids(), SEEDS)
def test_saved_and_cut_moments_come_back_identical(grid, seed):
    patches = nest(grid, random_features(grid, 5, np.random.default_rng(seed)))
    state = moments_of(patches)
    middle = max(1, grid.cells[-1] // 2)
    runs = [(0, middle), (middle, grid.cells[-1])] if middle < grid.cells[-1] else [(0, middle)]
    tensors = [state.cells(*run).packed() for run in runs]
    back = join_moments([Moments.of_packed(part) for part in tensors])
    for mean, same in zip(state.means, back.means, strict=True):
        assert torch.equal(mean, same)
    for row, same_row in zip(state.to(torch.float32).scatters, back.scatters, strict=True):
        for block, same in zip(row, same_row, strict=True):
            torch.testing.assert_close(block, same, rtol=2e-7, atol=1e-15)  # mirrored corners
