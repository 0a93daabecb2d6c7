"""Merge partial sums in a tree of Ray tasks while they arrive.

The driver holds references only. Every key (group and shard of cells) is merged on its own, on any
node of the cluster.
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

LAST_RANK = 10**6  # of statistics that are merged only when their group or round ends

Key = tuple[str, int]
"""Group and shard number."""


@dataclass(frozen=True)
class Source:
    """Where statistics are.

    Attributes:
        ref: a reference to a block of partial sums, or to what a task returned.
        row: row in the block; None if a task returned them.
    """

    ref: ray.ObjectRef
    row: int | None = None


@dataclass(frozen=True)
class Merged:
    """A key's merged statistics.

    Attributes:
        source: where they are.
        pooled: a reference to the statistics pooled over the shard's cells.
    """

    source: Source
    pooled: ray.ObjectRef


@dataclass
class MergeTree:
    """Partial sums of many keys, merged while they arrive.

    A sum's rank is the number of merges that it went through. `FAN_IN` sums of the same key and
    rank are merged to one of the next rank. So each partial sum is merged O(log n) times, and few
    sums are alive at once.

    Attributes:
        density: the density whose statistics they are.
        share: resources of a merging task.
    """

    density: Density
    share: Share
    _waiting: dict[tuple[Key, int], list[Source]] = field(default_factory=dict)

    def add(self, key: Key, block: ray.ObjectRef, row: int) -> None:
        """Add the partial sum in a row of a block."""
        self._add(key, Source(block, row), rank=0)

    def _add(self, key: Key, source: Source, rank: int) -> None:
        waiting = self._waiting.setdefault((key, rank), [])
        waiting.append(source)
        if len(waiting) == FAN_IN:
            del self._waiting[key, rank]
            self._add(key, merge_sources(self.density, waiting, self.share).source, rank + 1)

    def add_merged(self, key: Key, source: Source) -> None:
        """Add statistics of an earlier round, or of this one when it is committed."""
        self._waiting.setdefault((key, LAST_RANK), []).append(source)

    def finish(self, group: str, share: Share) -> dict[int, Merged]:
        """Merge the rest of a group, by tasks that ask for `share`.

        Returns:
            The merged statistics by shard number.
        """
        left: dict[int, list[Source]] = {}
        for (key, rank), _ in sorted(self._waiting.items(), key=lambda item: item[0][1]):
            if key[0] == group:
                left.setdefault(key[1], []).extend(self._waiting.pop((key, rank)))
        return {shard: merge_sources(self.density, parts, share) for shard, parts in left.items()}


def merge_sources(density: Density, sources: Sequence[Source], share: Share) -> Merged:
    """Merge statistics of one key by a task; a single one is only pooled."""
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
    parts = [  # views of the blocks, which take no memory
        read_statistics(density, row, value) for row, value in zip(rows, values, strict=True)
    ]
    with stage("merge", sum(part.count for part in parts)):
        total = reduce(add, (part.double() for part in parts))
        return StatisticsArrays.of(total), density.pool(total)


@ray.remote(max_retries=-1)
def _pool_task(density: Density, row: int | None, value: Any) -> Pooled:
    prepare_memory()
    return density.pool(read_statistics(density, row, value))
