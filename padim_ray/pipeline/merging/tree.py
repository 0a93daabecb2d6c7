"""Partial sums merged by a tree of Ray tasks while they arrive.

The driver holds references only. Every key (group, shard of cells) is merged on its own, anywhere
in the cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import ray

from padim_ray.densities.base import Density, Pooled
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.codec import StatisticsArrays, read_statistics
from padim_ray.planning.batches import FAN_IN
from padim_ray.planning.resources import Share

MERGED = 10**6  # rank of what is merged only when its group or round ends

Key = tuple[str, int]
"""Group and number of the shard."""


@dataclass(frozen=True)
class Source:
    """Where statistics are: in a row of a block, or (None) what a task returned."""

    ref: ray.ObjectRef
    row: int | None = None


@dataclass(frozen=True)
class Merged:
    """A key's statistics, and a reference to them pooled over the shard's cells."""

    source: Source
    pooled: ray.ObjectRef


@dataclass
class MergeTree:
    """Partial sums of many keys, merged while they arrive.

    Partial sums of the same rank (merged from as many others) wait for each other, so each is
    merged O(log n) times and few are alive at once.

    Attributes:
        density: whose statistics they are.
        share: what a merging task asks for.
    """

    density: Density
    share: Share
    _waiting: dict[tuple[Key, int], list[Source]] = field(default_factory=dict)

    def add(self, key: Key, block: ray.ObjectRef, row: int) -> None:
        """Take the partial sum in a row of a block of the pipeline's output."""
        self._add(key, Source(block, row), rank=0)

    def _add(self, key: Key, source: Source, rank: int) -> None:
        waiting = self._waiting.setdefault((key, rank), [])
        waiting.append(source)
        if len(waiting) == FAN_IN:
            del self._waiting[key, rank]
            self._add(key, merge_sources(self.density, waiting, self.share).source, rank + 1)

    def add_merged(self, key: Key, source: Source) -> None:
        """Take merged statistics, or those of an earlier round."""
        self._waiting.setdefault((key, MERGED), []).append(source)

    def finish(self, group: str, share: Share) -> dict[int, Merged]:
        """Merge what is left of a group, by tasks that ask for `share`: its shards by number."""
        left: dict[int, list[Source]] = {}
        for (key, rank), _ in sorted(self._waiting.items(), key=lambda item: item[0][1]):
            if key[0] == group:
                left.setdefault(key[1], []).extend(self._waiting.pop((key, rank)))
        return {shard: merge_sources(self.density, parts, share) for shard, parts in left.items()}


def merge_sources(density: Density, sources: Sequence[Source], share: Share) -> Merged:
    """Merge statistics of one key by a task."""
    if len(sources) == 1:
        (source,) = sources
        return Merged(
            source, _pool_task.options(**share.options).remote(density, source.row, source.ref)
        )
    merge = _merge_task.options(**share.options, num_returns=2)
    rows = [source.row for source in sources]
    state, pooled = merge.remote(density, rows, *[source.ref for source in sources])
    return Merged(Source(state), pooled)


@ray.remote(max_retries=-1)
def _merge_task(
    density: Density, rows: list[int | None], *values: Any
) -> tuple[StatisticsArrays, Pooled]:
    prepare_memory()
    parts = [  # views: no memory for the list
        read_statistics(density, row, value) for row, value in zip(rows, values, strict=True)
    ]
    with stage("merge", sum(part.count for part in parts)):
        total = reduce(add, (part.double() for part in parts))
        return StatisticsArrays.of(total), density.pool(total)


@ray.remote(max_retries=-1)
def _pool_task(density: Density, row: int | None, value: Any) -> Pooled:
    prepare_memory()
    return density.pool(read_statistics(density, row, value))
