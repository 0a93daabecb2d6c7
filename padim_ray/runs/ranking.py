"""Rank a run's images by score, to choose those for heatmaps and the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from padim_ray.images.manifest import group_counts
from padim_ray.images.sources import uris_to_fetch
from padim_ray.runs.options.score import ScoringOptions
from padim_ray.scoring.decision import Decision


@dataclass
class Scores:
    """The scores of all images of a run.

    `manifest`: n images, sorted by group. `shards`: the rows of each shard. `decisions`: by group.
    `values` (n,) float32: scores; NaN where an image failed or isn't scored yet.
    """

    manifest: pa.Table
    shards: Sequence[slice]
    decisions: Mapping[str, Decision]
    values: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.full(self.manifest.num_rows, np.nan, np.float32)

    def wanted(self, options: ScoringOptions) -> np.ndarray:
        """Rows of the images that get a heatmap, ascending."""
        if options.heatmaps == "all":
            return np.flatnonzero(np.isfinite(self.values))
        if options.heatmaps == "top":
            return np.sort(self.highest(options.top))
        highest = self.highest(options.report_images)
        flags = np.zeros(len(self.values), bool)
        for _, where, scores, decision in self.groups():
            flags[where] = decision.flags(scores)
        return np.union1d(highest, np.flatnonzero(flags))

    def highest(self, count: int) -> np.ndarray:
        """Rows of the `count` most anomalous images, in descending order.

        Images are ranked by score / threshold, which is comparable between groups. Images of groups
        without a threshold come last, by score. Ties keep the manifest's order; images without a
        score are left out.
        """
        excess, unjudged = np.zeros(len(self.values)), np.zeros(len(self.values), bool)
        for _, where, scores, decision in self.groups():
            excess[where] = decision.excess(scores)
            unjudged[where] = decision.threshold is None
        order = np.lexsort([-excess, unjudged])
        return order[np.isfinite(self.values[order])][:count]

    def groups(self) -> Iterator[tuple[str, slice, np.ndarray, Decision]]:
        """Iterate over the groups in the manifest's order: name, rows, scores and decision."""
        start = 0
        for group, count in group_counts(self.manifest).items():
            where = slice(start, start + count)
            yield group, where, self.values[where], self.decisions[group]
            start += count

    def by_shard(self, rows: np.ndarray) -> list[pa.Table]:
        """Split rows of the manifest into one table per shard.

        Args:
            rows: rows of the manifest, ascending.

        Returns:
            For each shard that has any of the rows, in order, a table with the columns `group`,
            `shard` (its number), `row` (within the shard) and `source` (the URI to fetch).
        """
        if not len(rows):
            return []
        starts = np.array([shard.start for shard in self.shards])
        numbers = np.searchsorted(starts, rows, side="right") - 1
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        tables = []
        for number, here in zip(numbers[firsts], np.split(rows, firsts[1:]), strict=True):
            start = starts[number]
            tables.append(
                pa.table(
                    {
                        "group": pa.repeat(self.manifest["group"][int(start)], len(here)),
                        "shard": pa.repeat(pa.scalar(int(number)), len(here)),
                        "row": pa.array(here - start, pa.int32()),
                        "source": pa.array(uris_to_fetch(self.manifest.take(here))),
                    }
                )
            )
        return tables
