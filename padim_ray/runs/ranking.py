"""All of a run's scores, and what follows from them together: which images are the highest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from padim_ray.images.manifest import group_counts
from padim_ray.images.sources import uris_to_fetch
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.scoring.decision import Decision


@dataclass
class Scores:
    """The scores of a manifest's rows.

    `values` (n,): NaN until scored, or where an image failed. `shards`: the rows of each shard.
    `decisions`: by group.
    """

    manifest: pa.Table
    shards: Sequence[slice]
    decisions: Mapping[str, Decision]
    values: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.full(self.manifest.num_rows, np.nan, np.float32)

    def wanted(self, options: ScoreOptions) -> np.ndarray:
        """The rows that get a heatmap, ascending."""
        if options.heatmaps == "all":
            return np.flatnonzero(np.isfinite(self.values))
        if options.heatmaps == "top":
            return np.sort(self.highest(options.top))
        highest = self.highest(options.report_images)
        flags = [decision.flags(scores) for _, _, scores, decision in self.groups()]
        return np.union1d(highest, np.flatnonzero(np.concatenate(flags)))

    def highest(self, count: int) -> np.ndarray:
        """The rows that exceed their threshold most, or come nearest to it, the highest first.

        Groups without a threshold come after those with one.
        """
        excess, unjudged = [], []
        for _, _, scores, decision in self.groups():
            excess.append(decision.excess(scores))
            unjudged.append(np.full(len(scores), decision.threshold is None))
        order = np.lexsort([-np.concatenate(excess), np.concatenate(unjudged)])
        return order[np.isfinite(self.values[order])][:count]

    def groups(self) -> Iterator[tuple[str, slice, np.ndarray, Decision]]:
        """Every group's name, rows of the manifest, scores and decision, in the rows' order."""
        start = 0
        for group, count in group_counts(self.manifest).items():
            where = slice(start, start + count)
            yield group, where, self.values[where], self.decisions[group]
            start += count

    def by_shard(self, rows: np.ndarray) -> list[pa.Table]:
        """Tables of `group`, `shard`, `row` in it and what to fetch (`source`): one per shard.

        Args:
            rows: of the manifest, ascending.
        """
        starts = np.array([where.start for where in self.shards])
        shards = np.searchsorted(starts, rows, side="right") - 1
        tables = []
        for here in np.split(rows, np.flatnonzero(np.diff(shards)) + 1) if len(rows) else []:
            shard = shards[np.searchsorted(rows, here[0])]
            columns = {
                "group": self.manifest["group"][int(starts[shard])],
                "shard": pa.scalar(int(shard)),
            }
            repeated = {name: pa.repeat(value, len(here)) for name, value in columns.items()}
            sources = pa.array(uris_to_fetch(self.manifest.take(here)))
            where = pa.array(here - starts[shard], pa.int32())
            tables.append(pa.table({**repeated, "row": where, "source": sources}))
        return tables
