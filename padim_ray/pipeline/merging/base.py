"""The published versions that new statistics are added to, or subtracted from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import ray

from padim_ray.densities.base import Density, Pooled
from padim_ray.errors import ModelError
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.merging.codec import StatisticsArrays, read_statistics
from padim_ray.pipeline.merging.tree import Merged, Source
from padim_ray.planning.resources import Share


@dataclass(frozen=True)
class BaseVersions:
    """Versions whose statistics images are added to, or subtracted from.

    The new version refers to the files of all groups that are neither changed nor named here.

    Attributes:
        versions: of one model or of several.
        subtract: whether images are subtracted, not added.
        left_out: of the versions, by index, groups that don't count.
        rewritten: groups that are written anew even if no image is added or subtracted, because
            several versions have them, or the density is another.
        copied: groups whose files are copied, because another model has them.
    """

    versions: tuple[ModelVersion, ...] = ()
    subtract: bool = False
    left_out: frozenset[tuple[int, str]] = frozenset()
    rewritten: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        return sorted({group for version in self.versions for group in version.groups})

    def images(self, group: str) -> int:
        """The number of images in a group's statistics, over all versions."""
        return sum(version.groups[group].images for version in self.holders(group))

    def holders(self, group: str) -> list[ModelVersion]:
        """The versions that have a group, each with that group only: tasks are sent them."""
        return [
            replace(version, groups={group: version.groups[group]})
            for index, version in enumerate(self.versions)
            if group in version.groups and (index, group) not in self.left_out
        ]

    def combine(
        self,
        density: Density,
        group: str,
        merged: Mapping[int, Merged],
        shards: int,
        share: Share,
    ) -> dict[int, Merged]:
        """Add a group's shards to those of the versions, or subtract them.

        Args:
            density: what is fitted to the result.
            group: its name.
            merged: statistics of images, by number of the shard; empty if there are none.
            shards: the number of shards.
            share: what a task asks for.

        Raises:
            ModelError: if a version is cut into other shards.
        """
        versions = self.holders(group)
        for version in versions:
            check_shards(version, group, shards)
        task = _combine_task.options(**share.options, num_returns=2)
        combined = {}
        for shard in range(shards):
            part = (merged[shard].source.row, merged[shard].source.ref) if merged else (None, None)
            state, pooled = task.remote(density, versions, group, shard, self.subtract, *part)
            combined[shard] = Merged(Source(state), pooled)
        return combined


def check_shards(version: ModelVersion, group: str, shards: int) -> None:
    """Raises: ModelError if the group is cut into another number of shards."""
    if version.groups[group].shards != shards:
        raise ModelError(
            f"{version.root.uri} was written by another padim-ray: it has group {group!r} "
            f"in {version.groups[group].shards} shards, not {shards}; fit it again"
        )


@ray.remote(max_retries=-1)
def _combine_task(
    density: Density,
    versions: Sequence[ModelVersion],
    group: str,
    shard: int,
    subtract: bool,
    row: int | None,
    value: Any,
) -> tuple[StatisticsArrays, Pooled]:
    prepare_memory()
    # one after the other: memory for two, however many models are merged
    total = reduce(add, (version.load_statistics(group, shard).double() for version in versions))
    if value is not None:
        part = read_statistics(density, row, value).double()
        total = total - part if subtract else total + part
    return StatisticsArrays.of(total), density.pool(total)
