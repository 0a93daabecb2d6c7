"""The reducer, given blocks of partial sums like those of the actors."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
import safetensors.torch
import torch

from padim_ray import ModelError
from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.errors import TooManyFailed
from padim_ray.features.grid import PatchGrid, split_cells
from padim_ray.model.draft import DraftVersion
from padim_ray.model.rounds import Round
from padim_ray.pipeline.merging.codec import partial_sum_row
from padim_ray.pipeline.merging.kept import kept_row
from padim_ray.pipeline.merging.reducer import Reducer
from padim_ray.planning.batches import FAN_IN
from padim_ray.planning.resources import Share
from padim_ray.runs.failures import Failures
from padim_ray.runs.options.common import JobOptions
from padim_ray.storage.location import Location
from tests.densities.test_moments import assert_close, join_moments, merge_all, moments_of
from tests.helpers.features import nest, random_features

pytestmark = pytest.mark.usefixtures("ray_cluster")

GRID = PatchGrid(((8, 8), (4, 4)), (3, 4))
SHARDS = split_cells(GRID.cells[-1], 3)
FAILED = {"/x": "decode: empty file", "/y": "fetch: not found"}
DENSITY = GaussianDensity(Regularization())
ROUNDED = 2**-24  # relative rounding error of a stored scatter
PARTS = FAN_IN**2 + FAN_IN + 2  # enough for two ranks of the tree, and some left over


def partial_sums(group, parts):
    """One block per part, with a row per state shard."""
    for state in parts:
        rows = [
            partial_sum_row(group, index, state.cells(*run), {}) for index, run in enumerate(SHARDS)
        ]
        yield ray.put(pa.concat_tables(rows))


def parts_of(seed, count):
    rng = np.random.default_rng(seed)
    return [
        moments_of(nest(GRID, random_features(GRID, 5, rng)), torch.float32) for _ in range(count)
    ]


def reducer_for(directory, *, round_images=10**9, max_failed=None, **listed):
    spec = SimpleNamespace(density=DENSITY, grid=GRID)
    draft = DraftVersion(Location.of(str(directory)), 1, spec, len(SHARDS))
    options = JobOptions(images="x", model="m", max_failed=max_failed)
    failures = Failures(options, sum(listed.values()))
    return Reducer(draft, Share(0.1), listed, round_images, failures)


def load(file, unpack, group):
    """Load the shards of a group from files of one kind."""
    files = [file(group, index).uri for index in range(len(SHARDS))]
    return [unpack(safetensors.torch.load_file(file)) for file in files]


def load_statistics(reducer, group):
    return join_moments(load(reducer.draft.statistics_file, DENSITY.unpack_statistics, group))


def test_many_partial_sums_become_the_moments_of_all(tmp_path):
    parts = {"a": parts_of(1, PARTS), "b": parts_of(2, 1)}
    reducer = reducer_for(tmp_path, a=5 * PARTS, b=5)
    for group, states in parts.items():
        for block in partial_sums(group, states):
            reducer.add(block)
    reducer.finish(Share(0.1))
    assert list(reducer.entries) == ["a", "b"] and not reducer.kept
    for group, states in parts.items():
        expected = merge_all(states)
        merged = load_statistics(reducer, group)
        assert_close(merged, expected, ROUNDED)
        whole = DENSITY.fit(expected, DENSITY.pool(expected))
        joined = DENSITY.join(load(reducer.draft.density_file, DENSITY.unpack_fitted, group))
        for row, same in zip(whole.whitening, joined.whitening, strict=True):
            for block, same_block in zip(row, same, strict=True):
                torch.testing.assert_close(block, same_block, rtol=1e-4, atol=1e-5)
        assert reducer.entries[group].images == expected.count


def test_groups_are_written_while_the_next_are_summed_up(tmp_path):
    """A problem of such a group is raised before a round is committed, at the latest."""
    same = [torch.ones(n, c, 4) for n, c in zip(GRID.cells, GRID.channels, strict=True)]
    reducer = reducer_for(tmp_path, a=5, b=4, c=5)
    for group, states in {
        "a": parts_of(1, 1),
        "b": [moments_of(same, torch.float32)],
        "c": parts_of(2, 1),
    }.items():
        for block in partial_sums(group, states):
            reducer.add(block)
    assert len(reducer._writing) == 2 and not reducer.entries
    with pytest.raises(ModelError, match="Group 'b' has a non-positive pivot"):
        reducer.commit()
    assert list(reducer.entries) == ["a"]
    assert Round.latest(reducer.draft.location, reducer.draft.root).rows == 0


def test_kept_embeddings_wait_without_their_partial_sums(tmp_path):
    rng = np.random.default_rng(0)
    batches = [
        GRID.nest([torch.from_numpy(level) for level in random_features(GRID, images, rng)])
        for images in (3, 2)
    ]
    uris = [["/1", "/2", "/3"], ["/4", "/5"]]
    (block,) = map(ray.get, partial_sums("a", parts_of(1, 1)))
    rows = [kept_row("a", *each) for each in zip(uris, batches, strict=True)]
    reducer = reducer_for(tmp_path, a=5)
    reducer.add(ray.put(pa.concat_tables([*rows, block])))
    assert [kept.images for kept in reducer.kept["a"]] == [3, 2]
    for kept, names, batch in zip(reducer.kept["a"], uris, batches, strict=True):
        found = ray.get(kept.ref)[kept.index]
        assert found.uris == names
        for level, expected in zip(found.embeddings().levels, batch.levels, strict=True):
            assert torch.equal(level, expected)
    reducer.finish(Share(0.1))
    assert reducer.entries["a"].images == 5


def test_a_lost_partial_sum_is_noticed(tmp_path):
    reducer = reducer_for(tmp_path, a=15)
    for block in partial_sums("a", parts_of(1, 2)):
        reducer.add(block)
    with pytest.raises(RuntimeError, match="10 of 15 images of group 'a' were read"):
        reducer.finish(Share(0.1))


def test_a_partial_sum_that_is_counted_twice_is_noticed(tmp_path):
    reducer = reducer_for(tmp_path, a=10)
    first, second = partial_sums("a", parts_of(1, 2))
    reducer.add(first)
    reducer.add(second)
    reducer._tree.add(("a", 0), first, 0)
    with pytest.raises(RuntimeError, match=r"10 images should be in 3 shards.*\[10, 15\] are in 3"):
        reducer.finish(Share(0.1))


@pytest.mark.parametrize("killed_after", range(1, 9))
def test_images_of_a_committed_round_are_not_read_again(tmp_path, killed_after):
    parts = {"a": parts_of(1, 5), "b": parts_of(2, 3)}
    blocks = [block for group, states in parts.items() for block in partial_sums(group, states)]
    failed = ray.put(partial_sum_row("b", 0, None, {"/x": "decode: empty file"}))
    blocks.insert(6, failed)
    lengths = [5] * 6 + [1] + [5] * 2
    listed = {"a": 25, "b": 16}
    killed = reducer_for(tmp_path, round_images=7, **listed)
    for block in blocks[:killed_after]:
        killed.add(block)
    reducer = reducer_for(tmp_path, round_images=7, **listed)
    starts = np.cumsum([0, *lengths]).tolist()
    first = starts.index(reducer.rows)  # rounds end at the end of a partial sum
    assert killed_after - 2 <= first <= killed_after
    assert reducer.count_failures.read == reducer.rows
    for block in blocks[first:]:
        reducer.add(block)
    reducer.finish(Share(0.1))
    reducer.commit()
    assert reducer.rows == 41 and reducer.failures == {"/x": "decode: empty file"}
    assert {g: (e.images, e.failed) for g, e in reducer.entries.items()} == {
        "a": (25, 0),
        "b": (15, 1),
    }
    for group, states in parts.items():
        merged = load_statistics(reducer, group)
        assert_close(merged, merge_all(states), 7 * ROUNDED)  # one rounding per round
    assert Round.latest(reducer.draft.location, reducer.draft.root).rows == 41


def test_too_many_failures_end_it_at_once(tmp_path):
    reducer = reducer_for(tmp_path, a=7, max_failed=1)
    with pytest.raises(TooManyFailed, match="2 of the 2 images read so far failed"):
        reducer.add(ray.put(partial_sum_row("a", 0, None, FAILED)))


def test_failed_images_are_not_counted(tmp_path):
    reducer = reducer_for(tmp_path, a=7)
    (block,) = partial_sums("a", parts_of(1, 1))
    reducer.add(block)
    reducer.add(ray.put(partial_sum_row("a", 0, None, FAILED)))
    reducer.finish(Share(0.1))
    assert (reducer.entries["a"].images, reducer.entries["a"].failed) == (5, 2)
    assert reducer.failures == FAILED


def test_a_group_without_readable_images_is_named_with_its_first_failure(tmp_path):
    reducer = reducer_for(tmp_path, a=2)
    reducer.add(ray.put(partial_sum_row("a", 0, None, FAILED)))
    with pytest.raises(ModelError, match=r"'a' has 0 readable images.*failure: decode: empty file"):
        reducer.finish(Share(0.1))


def test_a_group_whose_images_do_not_differ_is_named(tmp_path):
    reducer = reducer_for(tmp_path, a=4)
    cells = zip(GRID.cells, GRID.channels, strict=True)
    same = [torch.ones(count, channels, 4) for count, channels in cells]
    for block in partial_sums("a", [moments_of(same, torch.float32)]):
        reducer.add(block)
    with pytest.raises(ModelError, match="Group 'a' has a non-positive pivot"):
        reducer.finish(Share(0.1))


UNFETCHED = {
    group: {f"/{group}{n}": "fetch: permission denied" for n in range(10)} for group in "ab"
}


def blocks_again(group, states):
    """Blocks of the images in `UNFETCHED`, 5 by 5; of "b" the second half fails again."""
    uris = list(UNFETCHED[group])
    first, second = partial_sums(group, states)
    if group == "b":
        failures = {uri: UNFETCHED["b"][uri] for uri in uris[5:]}
        second = ray.put(partial_sum_row("b", 0, None, failures))
    return [(uris[:5], first), (uris[5:], second)]


def try_again(reducer, states, most):
    """Feed at most `most` blocks of images that are still unfetched, as the job does."""
    fed = 0
    for group in sorted(states, key=lambda group: (group != reducer.group, group)):
        for uris, block in blocks_again(group, states[group]):
            if set(uris) <= set(reducer.unfetched) and fed < most:
                reducer.try_again(uris)
                reducer.add(block)
                fed += 1
    if fed < most:
        reducer.finish(Share(0.1))
        reducer.commit()


@pytest.mark.parametrize("round_images", [1, 10**9])
@pytest.mark.parametrize("killed_after", range(5))
def test_images_that_could_not_be_fetched_are_added_later_once(
    tmp_path, round_images, killed_after
):
    parts = {"a": parts_of(1, 2), "b": parts_of(2, 1)}
    listed = {"a": 20, "b": 16}
    reducer = reducer_for(tmp_path, **listed)
    for group, states in parts.items():
        for block in partial_sums(group, states):
            reducer.add(block)
        reducer.add(ray.put(partial_sum_row(group, 0, None, UNFETCHED[group])))
    reducer.add(ray.put(partial_sum_row("b", 0, None, {"/x": "decode: empty file"})))
    reducer.finish(Share(0.1))
    reducer.commit()
    with pytest.raises(TooManyFailed, match=r"20 of 36 images .* could not be fetched"):
        reducer.count_failures.check_fetched()
    later = {"a": parts_of(3, 2), "b": parts_of(4, 2)}
    try_again(reducer_for(tmp_path, round_images=round_images, **listed), later, killed_after)
    reducer = reducer_for(tmp_path, round_images=round_images, **listed)
    try_again(reducer, later, 10**9)
    left = dict(list(UNFETCHED["b"].items())[5:]) | {"/x": "decode: empty file"}
    for found in (reducer, reducer_for(tmp_path, **listed)):
        assert found.failures == left and found.rows == 36
        assert {g: (e.images, e.failed) for g, e in found.entries.items()} == {
            "a": (20, 0),
            "b": (10, 6),
        }
    assert load_statistics(reducer, "a").count == 20
    expected = {"a": [*parts["a"], *later["a"]], "b": [*parts["b"], later["b"][0]]}
    for group, states in expected.items():
        assert_close(load_statistics(reducer, group), merge_all(states), 9 * ROUNDED)


def test_a_group_that_is_too_small_because_of_unfetched_images_is_no_mistake(tmp_path):
    reducer = reducer_for(tmp_path, a=10)
    reducer.add(ray.put(partial_sum_row("a", 0, None, UNFETCHED["a"])))
    with pytest.raises(TooManyFailed, match=r"10 of 10 images .* could not be fetched"):
        reducer.finish(Share(0.1))
    reducer.commit()
    parts = parts_of(1, 2)
    try_again(reducer_for(tmp_path, a=10), {"a": parts}, 10**9)
    assert_close(load_statistics(reducer, "a"), merge_all(parts), ROUNDED)
