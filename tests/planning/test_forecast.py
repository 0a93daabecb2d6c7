"""Forecasts compared with the tensors themselves, and how they respond to larger inputs."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.densities.shared import SharedDensity
from padim_ray.features.trunks import choose_channels
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.pipeline.merging import tree as tree_module
from padim_ray.pipeline.merging.tree import Merged, MergeTree
from padim_ray.planning.forecast import (
    Archive,
    Rates,
    State,
    device_bytes,
    forecast_fit,
    forecast_score,
    state_loads,
)
from padim_ray.planning.resources import Node, plan_resources
from padim_ray.planning.sums import count_sums
from padim_ray.runs.options.common import EMBEDDING_MEMORY

specs = st.builds(
    lambda layers, n_features, size, precision, density, cells: ModelSpec(
        backbone="resnet18",
        weights="",
        weights_sha256="",
        channels=choose_channels("resnet18", layers, n_features, seed=0),
        preprocessing=Preprocessing(size),
        density=density(Regularization()),
        precision=precision,
        sigma=4.0,
        stride=cells[0],
        neighbourhood=cells[1],
        score_share=0.02,
        search=0,
        search_maps=False,
    ),
    st.sampled_from([("layer1",), ("layer2", "layer3"), ("layer1", "layer2", "layer3")]),
    st.integers(1, 64),
    st.tuples(*[st.sampled_from([32, 64, 128, 256])] * 2),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([GaussianDensity, SharedDensity]),
    st.tuples(st.sampled_from([4, 8, 16, 32]), st.sampled_from([1, 3])),
)
groups = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.integers(2, 2000), min_size=1, max_size=9
)
archives = st.builds(
    lambda counts, bytes_, row: Archive(
        counts, bytes_ * sum(counts.values()), row * sum(counts.values())
    ),
    groups,
    st.integers(1, 10**7),
    st.integers(50, 500),
)
rates = st.builds(
    Rates, *[st.floats(0.1, 10_000)] * 3, factorise=st.floats(0, 10), source=st.just("")
)


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@given(specs)
def test_state_holds_the_sizes_of_the_tensors(spec):
    state, density = State.of(spec), spec.density
    statistics, fitted = density.empty(spec.grid), density.empty_fitted(spec.grid)
    assert state.statistics == size_of(statistics.named.values())
    assert state.density == size_of(fitted.named.values())
    stored = statistics.packed()
    del stored["count"]
    assert state.stored_statistics == size_of(stored.values())
    assert state.stored_density == size_of(fitted.packed().values())
    assert state.shards == len(state_shards(spec))
    doubled = size_of(statistics.double().named.values())
    assert state.merged == doubled + state.shards * density.pool(statistics).nbytes


@given(groups, st.integers(1, 300), st.integers(1, 3000), st.integers(1, 5000))
def test_the_number_of_sums_follows_from_the_images(counts, shard, batch, round_images):
    sums = count_sums(counts, shard, batch, round_images)
    least = sum(-(-images // batch) for images in counts.values())
    assert least <= sums.partials <= sum(counts.values())
    assert sums.merges <= sums.partials + sums.saves
    assert sums.saves <= sum(counts.values()) / round_images


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 300), min_size=1))
def test_merges_are_counted_as_the_merge_tree_makes_them(partials):
    merged = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(
            tree_module,
            "merge_sources",
            lambda density, parts, share: merged.append(len(parts)) or Merged(None, None),
        )
        for group, count in partials.items():
            tree = MergeTree(None, 1)
            for row in range(count):
                tree.add((group, 0), None, row)
            tree.finish(group, 1)
    # shards and batches hold one image, so each image is a partial sum
    sums = count_sums(partials, 1, 1, round_images=10**9)
    assert sums.partials == sum(partials.values())
    assert sums.merges == sum(parts > 1 for parts in merged)


@given(st.integers(1, 10**5), st.integers(1, 256), st.integers(1, 20))
def test_each_batch_of_whole_shards_is_one_sum(images, shard, shards):
    batch = shard * shards
    assert count_sums({"a": images}, shard, batch, 10**9).partials == -(-images // batch)


def forecasts(archive, spec, cluster, speed, actors=None):
    plan = plan_resources([cluster], actors)
    return (
        forecast_fit(archive, spec, plan, speed, 2000, 20_000, EMBEDDING_MEMORY),
        forecast_score(archive, spec, plan, speed),
    )


@given(archives, specs, rates, st.integers(1, 64), st.integers(0, 8), st.data())
def test_more_images_never_take_less(archive, spec, speed, cpus, gpus, data):
    group = data.draw(st.sampled_from(sorted(archive.groups)))
    more = {**archive.groups, group: archive.groups[group] + data.draw(st.integers(1, 5000))}
    share = sum(more.values()) / archive.images
    larger = Archive(more, round(archive.bytes * share), round(archive.manifest_bytes * share))
    cluster = Node(cpus, gpus)
    small, large = (forecasts(each, spec, cluster, speed) for each in (archive, larger))
    for before, after in zip(small, large, strict=True):
        assert after.read_bytes >= before.read_bytes
        assert after.reads > before.reads
        assert after.driver_bytes > before.driver_bytes
        if before.bound == after.bound == "decoding":
            assert after.hours > before.hours
    # a larger archive may have larger shards and fewer sums, so only scoring is monotonic
    assert large[1].object_store_bytes > small[1].object_store_bytes


@given(archives, specs, rates, st.integers(1, 8), st.integers(9, 64))
def test_more_or_faster_gpus_never_take_longer(archive, spec, speed, gpus, cpus):
    before = forecasts(archive, spec, Node(cpus, gpus), speed)
    faster = dataclasses.replace(speed, score=2 * speed.score, fit=2 * speed.fit)
    for sooner in (
        forecasts(archive, spec, Node(cpus + 1, gpus + 1), speed),
        forecasts(archive, spec, Node(cpus, gpus), faster),
    ):
        for a, b in zip(before, sooner, strict=True):
            assert b.hours <= a.hours * 1.0000001


@given(archives, specs, rates, st.integers(2, 64), st.integers(1, 8))
def test_a_job_is_never_faster_than_decoding_alone(archive, spec, speed, cpus, gpus):
    for job in forecasts(archive, spec, Node(cpus, gpus), speed):
        alone = job.reads / speed.decode / max(1, cpus - gpus)
        assert 3600 * job.hours >= alone * 0.999
        assert job.bound in ("driver", "GPUs", "decoding")
        assert job.bytes_per_second * 3600 * job.hours > 0.99 * job.read_bytes


@given(archives, specs)
def test_without_a_rate_hours_are_unknown(archive, spec):
    for job in forecasts(archive, spec, Node(8, 1), Rates(decode=100.0)):
        assert (job.hours, job.bytes_per_second, job.bound) == (None, None, "unknown")
        assert job.object_store_bytes and job.read_bytes


@given(groups, st.integers(1, 300), st.integers(1, 50))
def test_only_actors_that_get_shards_load_a_density(counts, shard, actors):
    loads = state_loads(counts, shard, actors)
    assert len(counts) <= loads <= actors * len(counts)
    assert state_loads(counts, shard, 1) == len(counts)


@given(specs, st.integers(0, 2**32))
def test_a_gpu_needs_more_than_the_state(spec, state):
    assert device_bytes(spec, state) > state
    assert device_bytes(spec, state + 1) == device_bytes(spec, state) + 1
    assert device_bytes(spec, state, kernels=True) < device_bytes(spec, state)
