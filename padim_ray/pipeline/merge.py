"""The reducer: partial sums merged by a tree of tasks, then factorised and written, shard by shard.

The driver holds references only. Every key (group, state shard) is merged, factorised and written
on its own, anywhere in the cluster.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import safetensors.torch

from padim_ray import gaussian, moments
from padim_ray.artifact import save_tensors, shard_location
from padim_ray.errors import ModelError
from padim_ray.gaussian import PooledScatter, Regularization
from padim_ray.moments import Blocks, Moments
from padim_ray.storage import Location

FAN_IN = 4


@dataclass
class MergeTree:
    """Partial sums of many keys, merged while they arrive.

    Partial sums of the same rank (merged from as many others) wait for each other, so that each is
    merged O(log n) times and few are alive at once. `cpus` is what a merging task asks for.
    """

    cpus: float
    _waiting: dict[tuple[Hashable, int], list["_Source"]] = field(default_factory=dict)

    def add(self, key: Hashable, block: ray.ObjectRef, row: int, rank: int = 0) -> None:
        """Take the partial sum in a row of a block of the pipeline's output."""
        self._add(key, _Source(block, row), rank)

    def _add(self, key: Hashable, source: "_Source", rank: int) -> None:
        waiting = self._waiting.setdefault((key, rank), [])
        waiting.append(source)
        if len(waiting) == FAN_IN:
            del self._waiting[key, rank]
            self._add(key, self._merge(waiting), rank + 1)

    def _merge(self, sources: list["_Source"]) -> "_Source":
        merged = _merge_task.options(num_cpus=self.cpus).remote(
            [source.row for source in sources], *[source.ref for source in sources]
        )
        return _Source(merged, None)

    def results(self) -> dict[Hashable, ray.ObjectRef]:
        """Each key's merged moments, float64, serialised."""
        left: dict[Hashable, list[_Source]] = {}
        for (key, _), sources in sorted(self._waiting.items(), key=lambda item: item[0][1]):
            left.setdefault(key, []).extend(sources)
        self._waiting.clear()
        return {key: self._merge(sources).ref for key, sources in left.items()}


@dataclass(frozen=True)
class _Source:
    ref: ray.ObjectRef
    row: int | None  # None: not a block, but what `_merge_task` returned


def serialise(state: Moments) -> bytes:
    """Moments as bytes, for the object store."""
    return safetensors.torch.save(moments.to_tensors(state))


def deserialise(data: bytes) -> Moments:
    """The inverse of `serialise`."""
    return moments.from_tensors(safetensors.torch.load(data))


@ray.remote
def _merge_task(rows: list[int | None], *objects: Any) -> bytes:
    total: Moments | None = None
    for row, value in zip(rows, objects, strict=True):
        data = value if row is None else value["state"][row].as_buffer().to_pybytes()
        part = deserialise(data)
        total = moments.merge_all([part] if total is None else [total, part])
    assert total is not None
    return serialise(total)


@ray.remote
def pool_task(state: bytes) -> PooledScatter:
    """The scatter of a state shard, summed over its cells."""
    return gaussian.pool(deserialise(state))


@ray.remote
def write_task(
    state: bytes,
    regularization: Regularization,
    offset: Blocks,
    root: Location,
    version: int,
    key: tuple[str, int],
    shards: int,
) -> str | None:
    """Factorise a state shard and write its moments and Gaussians; return what is wrong, if so."""
    group, shard = key
    merged = deserialise(state)
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
