"""The reducer: partial sums merged by a tree of tasks, then factorised and written, shard by shard.

The driver holds references only. Every key (group, state shard) is merged, factorised and written
on its own, anywhere in the cluster.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch

from padim_ray import gaussian, moments
from padim_ray.artifact import save_tensors, shard_location
from padim_ray.errors import ModelError
from padim_ray.gaussian import PooledScatter, Regularization
from padim_ray.moments import Blocks, Moments
from padim_ray.storage import Location

FAN_IN = 4

Key = tuple[str, int]
"""Group and number of the state shard."""


@dataclass
class MergeTree:
    """Partial sums of many keys, merged while they arrive.

    Partial sums of the same rank (merged from as many others) wait for each other, so that each is
    merged O(log n) times and few are alive at once. `cpus` is what a merging task asks for.
    """

    cpus: float
    _waiting: dict[tuple[Key, int], list["_Source"]] = field(default_factory=dict)

    def add(self, key: Key, block: ray.ObjectRef, row: int) -> None:
        """Take the partial sum in a row of a block of the pipeline's output."""
        self._add(key, _Source(block, row), rank=0)

    def _add(self, key: Key, source: "_Source", rank: int) -> None:
        waiting = self._waiting.setdefault((key, rank), [])
        waiting.append(source)
        if len(waiting) == FAN_IN:
            del self._waiting[key, rank]
            self._add(key, _Source(self._merge(waiting, self.cpus)[0], None), rank + 1)

    def _merge(self, sources: list["_Source"], cpus: float) -> list[ray.ObjectRef]:
        merge = _merge_task.options(num_cpus=cpus, num_returns=2)
        return merge.remote([source.row for source in sources], *[s.ref for s in sources])

    def results(self, cpus: float) -> dict[Key, "Merged"]:
        """Merge what is left of each key, by tasks that ask for `cpus`."""
        left: dict[Key, list[_Source]] = {}
        for (key, _), sources in sorted(self._waiting.items(), key=lambda item: item[0][1]):
            left.setdefault(key, []).extend(sources)
        self._waiting.clear()
        return {key: Merged(*self._merge(sources, cpus)) for key, sources in left.items()}


@dataclass(frozen=True)
class Merged:
    """References to a key's moments, and to their scatter summed over the cells."""

    state: ray.ObjectRef
    pooled: ray.ObjectRef


@dataclass(frozen=True)
class _Source:
    ref: ray.ObjectRef
    row: int | None  # None: not a block, but what `_merge_task` returned


def serialise(state: Moments) -> bytes:
    """Moments as bytes, for a row of a block."""
    return safetensors.torch.save(moments.to_tensors(state))


@ray.remote
def _merge_task(rows: list[int | None], *objects: Any) -> tuple["_Arrays", PooledScatter]:
    parts = (
        value.moments() if row is None else _deserialise(value["state"][row])
        for row, value in zip(rows, objects, strict=True)
    )
    total = next(parts).to(torch.float64)
    for part in parts:
        total = moments.merge(total, part.to(torch.float64))
    return _Arrays.of(total), gaussian.pool(total)


def _deserialise(state: pa.Scalar) -> Moments:
    return moments.from_tensors(safetensors.torch.load(state.as_buffer().to_pybytes()))


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


def factorise_and_write(
    merged: Mapping[Key, Merged],
    regularization: Regularization,
    root: Location,
    version: int,
    shards: int,
    cpus: float,
) -> None:
    """Write every key's moments and Gaussians into a version of the model.

    Args:
        shards: number of state shards of each group.
        cpus: what a task asks for.

    Raises:
        ModelError: naming a group whose covariances can't be factorised.
    """
    pooled: dict[str, PooledScatter] = {}
    for (group, _), part in merged.items():
        summed = ray.get(part.pooled)
        pooled[group] = pooled[group] + summed if group in pooled else summed
    offsets = {group: ray.put(regularization.offset(total)) for group, total in pooled.items()}
    written = [
        _write_task.options(num_cpus=cpus).remote(
            part.state, regularization, offsets[key[0]], root, version, key, shards
        )
        for key, part in merged.items()
    ]
    for problem in filter(None, ray.get(written)):
        raise ModelError(problem)


@ray.remote
def _write_task(
    state: _Arrays,
    regularization: Regularization,
    offset: Blocks,
    root: Location,
    version: int,
    key: Key,
    shards: int,
) -> str | None:
    """Factorise and write one state shard; return what is wrong, if anything."""
    group, shard = key
    merged = state.moments()
    try:
        whitened = gaussian.factorise(merged, regularization.scale(merged.count), offset)
    except ModelError as error:
        return f"Group {group!r} {error}"
    for kind, tensors in (
        ("moments", moments.to_tensors(merged)),
        ("gaussian", gaussian.to_tensors(whitened)),
    ):
        save_tensors(shard_location(root, version, group, kind, shard, shards), tensors)
    return None


@ray.remote
def describe_task(block: pa.Table) -> list[dict[str, Any]]:
    """The small columns of a block of partial sums."""
    return block.drop_columns(["state"]).to_pylist()
