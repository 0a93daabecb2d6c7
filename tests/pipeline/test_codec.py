"""Statistics as rows and arrays: what is read back equals what was written, without copies."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.features.grid import split_cells
from padim_ray.pipeline.merging.codec import (
    ALIGNMENT,
    StatisticsArrays,
    partial_sum_row,
    read_statistics,
)
from padim_ray.pipeline.merging.kept import KEPT, KeptEmbeddings, kept_row
from tests.densities.test_moments import SEEDS, moments_of
from tests.helpers.features import grids, nest, random_features

DENSITY = GaussianDensity(Regularization())
failures = st.dictionaries(st.text(), st.text(min_size=1), max_size=3)


def assert_equal(a, b):
    assert a.count == b.count
    assert a.named.keys() == b.named.keys()
    for name, tensor in a.named.items():
        assert tensor.dtype == b.named[name].dtype
        assert torch.equal(tensor, b.named[name])


def addresses(statistics):
    return [tensor.data_ptr() for tensor in statistics.named.values()]


@given(
    grids(),
    SEEDS,
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
    failures,
)
def test_rows_of_a_block_hold_the_statistics(grid, seed, images, shards, dtype, failed):
    whole = moments_of(
        nest(grid, random_features(grid, images, np.random.default_rng(seed))), dtype
    )
    parts = [whole.cells(*run) for run in split_cells(grid.cells[-1], shards)]
    rows = [partial_sum_row("a", number, part, failed) for number, part in enumerate(parts)]
    block = pa.concat_tables(rows).combine_chunks()
    assert block["group"].to_pylist() == ["a"] * len(parts)
    assert block["shard"].to_pylist() == list(range(len(parts)))
    assert block["count"].to_pylist() == [images] * len(parts)
    assert dict(block["failures"][0].as_py()) == failed
    state = block["state"].chunk(0).buffers()[2]
    for row, part in enumerate(parts):
        read = read_statistics(DENSITY, row, block)
        assert_equal(read, part)
        assert addresses(read)[0] % ALIGNMENT == 0
        assert all(0 <= at - state.address < state.size for at in addresses(read))  # not copied


@given(grids(), SEEDS, st.integers(1, 5), st.sampled_from(["float32", "bfloat16"]), st.data())
def test_a_row_of_kept_embeddings_holds_them(grid, seed, images, precision, data):
    """On GPUs embeddings are padded, which the row isn't."""
    features = random_features(grid, images, np.random.default_rng(seed))
    padding = data.draw(st.integers(0, 3))
    padded = [np.pad(each, [(0, 0), (0, padding), (0, 0), (0, 0)]) for each in features]
    maps = [torch.from_numpy(each).to(getattr(torch, precision)) for each in padded]
    uris = [f"s3://b/{number}" for number in range(images)]
    row = kept_row("a", uris, grid.nest(maps))
    assert row["shard"].to_pylist() == [KEPT] and row["count"].to_pylist() == [images]
    assert pa.concat_tables([row, partial_sum_row("a", 0, None, {})]).num_rows == 2
    kept = KeptEmbeddings.of_row(row)
    assert kept.uris == uris
    read = kept.embeddings()
    assert read.channels == grid.channels
    for level, each, channels in zip(
        read.levels, grid.nest(maps).levels, grid.channels, strict=True
    ):
        assert torch.equal(level, each[..., :channels]) and level.dtype == each.dtype


@given(grids(), SEEDS)
def test_arrays_share_the_memory_of_the_statistics(grid, seed):
    statistics = moments_of(nest(grid, random_features(grid, 3, np.random.default_rng(seed))))
    read = read_statistics(DENSITY, None, StatisticsArrays.of(statistics))
    assert_equal(read, statistics)
    assert addresses(read) == addresses(statistics)


def test_a_row_without_images_holds_the_failures_only():
    failed = {"x.png": "decode: empty file", "y.png": "fetch: not found"}
    row = partial_sum_row("a", 0, None, failed)
    assert row.num_rows == 1 and row["count"].to_pylist() == [0]
    assert dict(row["failures"][0].as_py()) == failed
    assert StatisticsArrays.of_row(row) == StatisticsArrays(0, {})
    other = partial_sum_row("b", 1, moments_of([torch.ones(4, 2, 3)], torch.float32), {})
    assert pa.concat_tables([row, other]).num_rows == 2  # of the same schema
