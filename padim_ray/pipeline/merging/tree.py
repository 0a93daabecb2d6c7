"""Partial sums merged by a tree of Ray tasks while they arrive."""

from dataclasses import dataclass, field
from typing import Any

import ray

from padim_ray.densities.gaussian import moments
from padim_ray.densities.gaussian.regularization import PooledScatter, pool
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.codec import MomentArrays, read_moments
from padim_ray.planning.batches import FAN_IN
from padim_ray.planning.resources import Share

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


@ray.remote(max_retries=-1)
def _merge_task(rows: list[int | None], *objects: Any) -> tuple["MomentArrays", PooledScatter]:
    prepare_memory()
    parts = list(map(read_moments, rows, objects))  # views: no memory for the list
    with stage("merge", sum(part.count for part in parts)):
        total = moments.merge_all(parts)
        return MomentArrays.of(total), pool(total)


@ray.remote(max_retries=-1)
def _pool_task(row: int | None, value: Any) -> PooledScatter:
    prepare_memory()
    return pool(read_moments(row, value))
