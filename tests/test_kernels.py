"""Triton kernels compared with the plain operators; without a GPU, in Triton's interpreter."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from padim_ray.densities.gaussian.moments import Moments, accumulate_, empty_moments
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import factorise, squared_distances
from padim_ray.features.cells import average_cells
from padim_ray.features.grid import Embeddings
from tests.helpers.features import grids, random_features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tl = pytest.importorskip("triton.language", reason="no Triton on this platform")
pooling = pytest.importorskip("padim_ray.features.kernels")
kernels = pytest.importorskip(
    "padim_ray.densities.gaussian.kernels", reason="no Triton on this platform"
)
# Triton's interpreter truncates where a GPU rounds
EXACT = 1e-6 if DEVICE == "cuda" else 3e-5
few = settings(max_examples=20 if DEVICE == "cuda" else 4, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Repair Triton's interpreter, which multiplies bfloat16 operands by their bits."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    multiply = interpreter.InterpreterBuilder.create_dot

    def convert(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.interpreter_builder.cast_impl(operand, tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *others: multiply(self, convert(a), convert(b), *others),
        )
        yield


def random_embeddings(grid, images, rng) -> Embeddings:
    features = [torch.from_numpy(level) for level in random_features(grid, images, rng)]
    levels = [level.to(DEVICE, torch.bfloat16) for level in features]
    filled_up = [
        torch.cat([level, level[:, -1:].expand(-1, rng.integers(4), -1, -1)], 1) for level in levels
    ]
    return grid.nest(filled_up)


def in_float64(moments: Moments) -> Moments:
    return moments.to(torch.float64)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@few
@given(grids(), st.lists(st.integers(1, 40), min_size=1, max_size=2), seeds)
def test_moments_equal_those_in_float64(grid, batches, rng):
    state = empty_moments(grid.cells, grid.channels, device=DEVICE)
    exact = in_float64(empty_moments(grid.cells, grid.channels, device=DEVICE))
    for images in batches:
        embeddings = random_embeddings(grid, images, rng)
        state = kernels.accumulate_(state, embeddings)
        exact = accumulate_(exact, [patch.double() for patch in embeddings.patches()])
    assert state.count == exact.count == sum(batches)
    for mean, expected in zip(state.means, exact.means, strict=True):
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
    for row, expected_row in zip(state.scatters, exact.scatters, strict=True):
        for block, expected in zip(row, expected_row, strict=True):
            atol = EXACT * float(expected.abs().max())
            torch.testing.assert_close(block.double(), expected, rtol=0, atol=atol)


@few
@given(grids(), st.integers(1, 40), seeds)
def test_distances_equal_the_plain_ones(grid, images, rng):
    fitted = random_embeddings(grid, 60, rng)
    state = empty_moments(grid.cells, grid.channels, device=DEVICE)
    state = accumulate_(state, fitted.patches())
    rule = Regularization()
    gaussian = factorise(state, rule.scale(state.count), rule.offset(pool(state)))
    embeddings = random_embeddings(grid, images, rng)
    aligned = kernels.align_rows(gaussian)
    distances = kernels.squared_distances(rng.choice([gaussian, aligned]), embeddings)
    expected = squared_distances(gaussian, embeddings.patches())
    torch.testing.assert_close(distances, expected, rtol=5e-3, atol=1e-3)


@few
@given(grids(), st.sampled_from([1e-6, 1e5]), seeds)
def test_distances_do_not_depend_on_the_features_scale(grid, scale, rng):
    embeddings = random_embeddings(grid, 30, rng)
    levels = tuple((level.float() * scale).bfloat16() for level in embeddings.levels)
    scaled = Embeddings(levels, embeddings.channels)
    rule = Regularization()
    state = empty_moments(grid.cells, grid.channels, device=DEVICE)
    state = accumulate_(state, scaled.patches())
    gaussian = factorise(state, rule.scale(state.count), rule.offset(pool(state)))
    expected = squared_distances(gaussian, scaled.patches())
    distances = kernels.squared_distances(gaussian, scaled)
    torch.testing.assert_close(distances, expected, rtol=5e-3, atol=1e-3)


@few
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 16, 64]), seeds
)
def test_pooling_equals_pytorchs(images, height, width, channels, rng):
    values = torch.from_numpy(rng.normal(size=(images, channels, height, width)).astype("f4"))
    x = values.relu().to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    expected = torch.nn.functional.max_pool2d(x.float(), 3, stride=2, padding=1)
    assert torch.equal(pooling.max_pool(x).float(), expected)


@few
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 150),
    seeds,
)
def test_averages_over_cells_equal_plain_ones(dtype, positions, neighbourhood, channels, rng):
    height, width = (int(positions * rng.integers(1, 4)) for _ in range(2))
    maps = torch.from_numpy(rng.gamma(1.5, size=(2, channels, height, width))).to(DEVICE, dtype)
    maps = maps.to(memory_format=torch.channels_last)
    grid = height // positions, width // positions
    (expected,) = average_cells([maps.double().cpu()], [grid], neighbourhood)
    found = pooling.average(maps, positions, neighbourhood)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=1e-7)
