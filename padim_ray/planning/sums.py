"""Count a fit's partial sums, and the merges and rounds that they go through."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from padim_ray.planning.batches import FAN_IN

MERGED_RANK = -1
"""Rank of the statistics that earlier rounds merged."""


@dataclass(frozen=True)
class SumCounts:
    """Numbers of a fit's partial sums and of what happens to them.

    Attributes:
        partials: partial sums.
        merges: merges of up to `FAN_IN` of them.
        saves: times that an unfinished group's moments are saved with a round.
    """

    partials: int = 0
    merges: int = 0
    saves: int = 0


def count_sums(groups: Mapping[str, int], shard: int, batch: int, round_images: int) -> SumCounts:
    """Follow the images through the partial sums, the merge tree and the rounds.

    Args:
        groups: number of images per group, in the manifest's order.
        shard: images per shard; a group's last one may have fewer.
        batch: images per batch, see `images_per_batch`.
        round_images: images after which a round is committed.
    """
    partials = merges = saves = rows = committed = 0
    waiting: Counter[int] = Counter()  # the current group's sums, by rank
    current: str | None = None

    def merge_rest() -> int:
        left = waiting.total()
        waiting.clear()
        return int(left > 1)

    for group, images in _partial_sums(groups, shard, batch):
        partials += 1
        if group != current:
            merges += merge_rest()
        if rows - committed >= round_images:
            committed = rows
            if waiting:
                merges, saves = merges + merge_rest(), saves + 1
                waiting[MERGED_RANK] = 1  # until its group ends
        current, rows, rank = group, rows + images, 0
        waiting[0] += 1
        while waiting[rank] == FAN_IN:
            del waiting[rank]
            merges, rank = merges + 1, rank + 1
            waiting[rank] += 1
    return SumCounts(partials, merges + merge_rest(), saves)


def _partial_sums(groups: Mapping[str, int], shard: int, batch: int) -> Iterator[tuple[str, int]]:
    """Yield group and number of images of each partial sum.

    A task for an actor holds as many whole shards as fill a batch. The actor gets its rows batch by
    batch, and makes one partial sum per group in a batch.
    """
    task: dict[str, int] = {}

    def cut() -> Iterator[tuple[str, int]]:
        start = 0
        for group, images in task.items():
            end = start + images
            while start < end:
                stop = min(end, (start // batch + 1) * batch)
                yield group, stop - start
                start = stop

    for group, images in groups.items():
        for first in range(0, images, shard):
            task[group] = task.get(group, 0) + min(shard, images - first)
            if sum(task.values()) >= batch:
                yield from cut()
                task.clear()
    yield from cut()
