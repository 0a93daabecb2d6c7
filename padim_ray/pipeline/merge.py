"""Partial sums merged by a tree of tasks, then factorised and written, shard by shard.

The driver holds references only. Every key (group, state shard) is merged, factorised and written
on its own, anywhere in the cluster.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch

from padim_ray import gaussian, moments
from padim_ray.artifact import (
    ModelVersion,
    save_calibration,
    save_tensors,
    shard_location,
    version_location,
)
from padim_ray.description import GroupEntry
from padim_ray.errors import ModelError
from padim_ray.gaussian import PooledScatter, Regularization
from padim_ray.moments import Blocks, Moments
from padim_ray.pipeline.batches import FAN_IN
from padim_ray.pipeline.memory import give_back_memory, prepare_memory
from padim_ray.pipeline.prometheus import stage
from padim_ray.pipeline.resources import Share
from padim_ray.storage import Location

log = logging.getLogger("padim_ray")

ALIGNED = 64  # bytes, as Arrow has it
MERGED = 10**6  # rank of what is merged only when its group or round ends

Key = tuple[str, int]
"""Group and number of the state shard."""


@dataclass
class MergeTree:
    """Partial sums of many keys, merged while they arrive.

    Partial sums of the same rank (merged from as many others) wait for each other, so that each is
    merged O(log n) times and few are alive at once. `share` is what a merging task asks for.
    """

    share: Share
    _waiting: dict[tuple[Key, int], list["Source"]] = field(default_factory=dict)

    def add(self, key: Key, block: ray.ObjectRef, row: int) -> None:
        """Take the partial sum in a row of a block of the pipeline's output."""
        self._add(key, Source(block, row), rank=0)

    def _add(self, key: Key, source: "Source", rank: int) -> None:
        waiting = self._waiting.setdefault((key, rank), [])
        waiting.append(source)
        if len(waiting) == FAN_IN:
            del self._waiting[key, rank]
            self._add(key, _merge(waiting, self.share).source, rank + 1)

    def add_merged(self, key: Key, source: "Source") -> None:
        """Take merged moments, or ones from an earlier round."""
        self._waiting.setdefault((key, MERGED), []).append(source)

    def finish(self, group: str, share: Share) -> dict[int, "Merged"]:
        """Merge what is left of a group, by tasks that ask for `share`: its state shards."""
        left: dict[int, list[Source]] = {}
        for (key, rank), _ in sorted(self._waiting.items(), key=lambda item: item[0][1]):
            if key[0] == group:
                left.setdefault(key[1], []).extend(self._waiting.pop((key, rank)))
        return {shard: _merge(parts, share) for shard, parts in left.items()}


@dataclass(frozen=True)
class Source:
    """Where moments are: in a row of a block, or (None) what a task of this module returned."""

    ref: ray.ObjectRef
    row: int | None = None


@dataclass(frozen=True)
class Merged:
    """A key's moments, and a reference to their scatter summed over the cells."""

    source: Source
    pooled: ray.ObjectRef


def _merge(sources: list[Source], share: Share) -> Merged:
    if len(sources) == 1:
        (source,) = sources
        pool = _pool_task.options(**share.options)
        return Merged(source, pool.remote(source.row, source.ref))
    merge = _merge_task.options(**share.options, num_returns=2)
    state, pooled = merge.remote([source.row for source in sources], *[s.ref for s in sources])
    return Merged(Source(state), pooled)


def serialise(state: Moments) -> pa.Buffer:
    """Moments in one buffer, for a row of a block: they are read from there without a copy."""
    tensors = [pa.Tensor.from_numpy(tensor.numpy()) for tensor in state.tensors]
    size = sum(map(pa.ipc.get_tensor_size, tensors))
    # one of PyTorch's own, whose pages are large; rows that follow each other stay aligned
    buffer = pa.py_buffer(torch.zeros(-(-size // ALIGNED) * ALIGNED, dtype=torch.uint8).numpy())
    with pa.FixedSizeBufferWriter(buffer) as writer:
        for tensor in tensors:
            pa.ipc.write_tensor(tensor, writer)
    return buffer


@ray.remote(max_retries=-1)
def _merge_task(rows: list[int | None], *objects: Any) -> tuple["_Arrays", PooledScatter]:
    prepare_memory()
    parts = list(map(_moments, rows, objects))  # views: no memory for the list
    with stage("merge", sum(part.count for part in parts)):
        total = moments.merge_all(parts)
        return _Arrays.of(total), gaussian.pool(total)


@ray.remote(max_retries=-1)
def _pool_task(row: int | None, value: Any) -> PooledScatter:
    prepare_memory()
    return gaussian.pool(_moments(row, value))


def _moments(row: int | None, value: Any) -> Moments:
    """What a `Source` refers to."""
    return value.moments() if row is None else _deserialise(value.slice(row, 1))


def _deserialise(partial: pa.Table) -> Moments:
    """The moments in a row of a block, as views of it."""
    buffer = partial["state"][0].as_buffer()
    tensors: list[np.ndarray] = []
    with pa.BufferReader(buffer) as reader:
        while buffer.size - reader.tell() >= ALIGNED:
            tensors.append(pa.ipc.read_tensor(reader).to_numpy())
    means = [tensor for tensor in tensors if tensor.ndim == 2]
    blocks = iter(tensors[len(means) :])
    rows = [tuple(islice(blocks, len(means) - level)) for level in range(len(means))]
    return _Arrays(partial["count"][0].as_py(), tuple(means), tuple(rows)).moments()


@dataclass(frozen=True)
class _Arrays:
    """Moments as arrays, which Ray's object store shares without a copy, unlike tensors."""

    count: int
    means: tuple[np.ndarray, ...]
    scatters: tuple[tuple[np.ndarray, ...], ...]

    @classmethod
    def of(cls, state: Moments) -> "_Arrays":
        return cls(
            state.count,
            tuple(mean.numpy() for mean in state.means),
            tuple(tuple(block.numpy() for block in row) for row in state.scatters),
        )

    def moments(self) -> Moments:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arrays are read-only, and nothing writes to them
            return Moments(
                self.count,
                tuple(map(torch.from_numpy, self.means)),
                tuple(tuple(map(torch.from_numpy, row)) for row in self.scatters),
            )


@dataclass(frozen=True)
class Base:
    """What there is already: versions whose moments images are added to, or taken from.

    `left_out`: of the versions, by index, groups that don't count. `summed`: groups that are
    written anew even if no image is added or taken, because several versions have them. `copied`:
    groups whose files are copied, because another model has them. To all others' files the new
    version only refers.
    """

    versions: tuple[ModelVersion, ...] = ()
    takes: bool = False
    left_out: frozenset[tuple[int, str]] = frozenset()
    summed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        return sorted({group for version in self.versions for group in version.groups})

    def images(self, group: str) -> int:
        """In the group's moments, over all versions."""
        return sum(version.groups[group].images for version in self.holders(group))

    def combine(
        self, group: str, merged: Mapping[int, Merged], shards: int, share: Share
    ) -> dict[int, Merged]:
        """Add a group's state shards to those of the versions, or take them from there.

        Args:
            merged: sums of images, by number of the shard; empty if there are none.

        Raises:
            ModelError: if a version has its shards cut otherwise.
        """
        versions = self.holders(group)
        for version in versions:
            _check_shards(version, group, shards)
        task = _combine_task.options(**share.options, num_returns=2)
        combined = {}
        for shard in range(shards):
            part = (merged[shard].source.row, merged[shard].source.ref) if merged else (None, None)
            state, pooled = task.remote(versions, group, shard, self.takes, *part)
            combined[shard] = Merged(Source(state), pooled)
        return combined

    def holders(self, group: str) -> list[ModelVersion]:
        """The versions that have a group, with nothing of others: tasks are sent them."""
        return [
            replace(version, groups={group: version.groups[group]})
            for index, version in enumerate(self.versions)
            if group in version.groups and (index, group) not in self.left_out
        ]


def _check_shards(version: ModelVersion, group: str, shards: int) -> None:
    if version.groups[group].shards != shards:
        raise ModelError(
            f"{version.root.uri} was written by another padim-ray: it has group {group!r} "
            f"in {version.groups[group].shards} shards, not {shards}; fit it again"
        )


@ray.remote(max_retries=-1)
def _combine_task(
    versions: Sequence[ModelVersion],
    group: str,
    shard: int,
    takes: bool,
    row: int | None,
    value: Any,
) -> tuple["_Arrays", PooledScatter]:
    prepare_memory()
    # one after the other: memory for two, however many models are merged
    parts = (version.load_moments(group, shard).to(torch.float64) for version in versions)
    total = reduce(moments.merge, parts)
    if value is not None:
        part = _moments(row, value).to(torch.float64)
        total = moments.subtract(total, part) if takes else moments.merge(total, part)
    return _Arrays.of(total), gaussian.pool(total)


def factorise_and_write(
    group: str,
    merged: Mapping[int, Merged],
    count: int,
    regularization: Regularization,
    target: "Target",
    share: Share,
) -> None:
    """Write a group's moments and Gaussians into a version of the model.

    Args:
        merged: its state shards, by number.
        count: the images that must be in each of them.
        share: what a task asks for.

    Raises:
        ModelError: naming a group whose covariances can't be factorised.
        RuntimeError: if the moments are not of `count` images: an image lost, or counted twice.
    """
    pools = check_counts(group, merged, count, target.shards)
    offset = ray.put(regularization.offset(sum(pools[1:], pools[0])))
    written = [
        _write_task.options(**share.options).remote(
            part.source.row, part.source.ref, regularization, offset, target, group, shard
        )
        for shard, part in merged.items()
    ]
    for problem in filter(None, ray.get(written)):
        raise ModelError(problem)


def check_counts(
    group: str, merged: Mapping[int, Merged], count: int, shards: int
) -> list[PooledScatter]:
    """Make sure that every image is in the moments, once; the shards' scatters, summed over cells.

    Raises:
        RuntimeError: if an image was lost, or counted twice.
    """
    pools = ray.get([part.pooled for part in merged.values()])
    counts = {pool.count for pool in pools}
    if len(merged) != shards or counts != {count}:
        raise RuntimeError(
            f"Group {group!r}: {count} images should be in {shards} shards of moments, but "
            f"{sorted(counts)} are in {len(merged)}"
        )
    return pools


@dataclass(frozen=True)
class Target:
    """The version of a model that is being written, and how many state shards its groups have."""

    root: Location
    version: int
    shards: int

    @property
    def location(self) -> Location:
        return version_location(self.root, self.version)

    def file(self, group: str, kind: str, shard: int) -> Location:
        return shard_location(self.root, self.version, group, kind, shard, self.shards)

    def check_written(self, group: str) -> None:
        """Raises: ModelError if the driver doesn't find a file that a worker wrote."""
        for kind in ("moments", "gaussian"):
            for shard in range(self.shards):
                location = self.file(group, kind, shard)
                if not location.exists():
                    raise ModelError(
                        f"A worker wrote {location.uri}, which isn't there: on a cluster the model "
                        "needs storage that all nodes share"
                    )


@ray.remote(max_retries=-1)
def _write_task(
    row: int | None,
    value: Any,
    regularization: Regularization,
    offset: Blocks,
    target: Target,
    group: str,
    shard: int,
) -> str | None:
    """Factorise and write one state shard; return what is wrong, if anything."""
    prepare_memory()
    merged = _moments(row, value)
    try:
        with stage("factorise", merged.count):
            whitened = gaussian.factorise(merged, regularization.scale(merged.count), offset)
    except ModelError as error:
        return f"Group {group!r} {error}"
    save_tensors(target.file(group, "moments", shard), moments.to_tensors(merged))
    save_tensors(target.file(group, "gaussian", shard), gaussian.to_tensors(whitened))
    del merged, whitened
    give_back_memory()
    return None


def copy_groups(
    holders: Mapping[str, ModelVersion], target: "Target", share: Share
) -> dict[str, GroupEntry]:
    """Write groups of other models' versions into this one as they are, calibration and all.

    Args:
        holders: by group.
        share: what a task asks for, of which there is one per state shard.

    Returns:
        Their entries.

    Raises:
        ModelError: if a version has its shards cut otherwise.
    """
    for group, version in holders.items():
        _check_shards(version, group, target.shards)
    task = _copy_task.options(**share.options)
    ray.get(
        [
            task.remote(version, group, shard, target)
            for group, version in holders.items()
            for shard in range(target.shards)
        ]
    )
    return {group: replace(each.groups[group], version=None) for group, each in holders.items()}


@ray.remote(max_retries=-1)
def _copy_task(version: ModelVersion, group: str, shard: int, target: "Target") -> None:
    """Read and write, and so check, a shard; with the first one goes the calibration."""
    prepare_memory()
    state = moments.to_tensors(version.load_moments(group, shard))
    save_tensors(target.file(group, "moments", shard), state)
    whitened = gaussian.to_tensors(version.load_gaussian(group, shard))
    save_tensors(target.file(group, "gaussian", shard), whitened)
    calibration = version.load_calibration(group) if shard == 0 else None
    if calibration:
        save_calibration(target.root, target.version, group, calibration)
    give_back_memory()


def save(part: Merged, file: Location, share: Share) -> ray.ObjectRef:
    """Write merged moments, by a task that asks for `share`."""
    return _save_task.options(**share.options).remote(part.source.row, part.source.ref, file)


@ray.remote(max_retries=-1)
def _save_task(row: int | None, value: Any, file: Location) -> None:
    prepare_memory()
    save_tensors(file, moments.to_tensors(_moments(row, value)))


def load(file: Location, share: Share) -> Source:
    """Read them back."""
    return Source(_load_task.options(**share.options).remote(file))


@ray.remote(max_retries=-1)
def _load_task(file: Location) -> _Arrays:
    prepare_memory()
    with file.as_local_file() as path:
        return _Arrays.of(moments.from_tensors(safetensors.torch.load_file(path)))
