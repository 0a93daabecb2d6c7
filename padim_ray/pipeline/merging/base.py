"""Published versions whose statistics new images are added to or subtracted from."""

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
    """Versions whose statistics new images are added to, or subtracted from.

    Groups that neither change nor are named here keep their files: the new version refers to them.

    Attributes:
        versions: versions of one model or of several.
        subtract: whether images are subtracted instead of added.
        left_out: groups that are ignored, as pairs of a version's index and a group.
        rewritten: groups that are written anew even if no image is added or subtracted, because
            several versions have them or the density's settings differ.
        copied: groups whose files are copied from another model.
    """

    versions: tuple[ModelVersion, ...] = ()
    subtract: bool = False
    left_out: frozenset[tuple[int, str]] = frozenset()
    rewritten: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        """Names of the groups of all versions, sorted."""
        return sorted({group for version in self.versions for group in version.groups})

    def images(self, group: str) -> int:
        """The number of images in a group's statistics, over all versions."""
        return sum(version.groups[group].images for version in self.holders(group))

    def holders(self, group: str) -> list[ModelVersion]:
        """The versions that have a group, each reduced to it so that tasks receive little."""
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
        """Add a group's shards to those of the versions, or subtract them from these.

        Args:
            density: the density of the new version.
            group: the group's name.
            merged: statistics of the new images by shard number; empty if there are none.
            shards: number of shards.
            share: resources of a task.

        Returns:
            The combined statistics by shard number.

        Raises:
            ModelError: if a version has another number of shards.
        """
        versions = self.holders(group)
        for version in versions:
            check_shards(version, group, shards)
        task = _combine_task.options(**share.options, num_returns=2)
        combined = {}
        for shard in range(shards):
            part = (merged[shard].source.row, merged[shard].source.ref) if merged else (None, None)
            # Ray's stubs ignore num_returns
            refs: Any = task.remote(density, versions, group, shard, self.subtract, *part)
            state, pooled = refs
            combined[shard] = Merged(Source(state), pooled)
        return combined


def check_shards(version: ModelVersion, group: str, shards: int) -> None:
    """Raises: ModelError if the version has the group in another number of shards."""
    if version.groups[group].shards != shards:
        raise ModelError(
            f"{version.root.uri} was written by another release of padim-ray: it has group "
            f"{group!r} in {version.groups[group].shards} shards, not {shards}; fit it again"
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
    # a generator, so that at most two are in memory however many models are merged
    total = reduce(add, (version.load_statistics(group, shard).double() for version in versions))
    if value is not None:
        part = read_statistics(density, row, value).double()
        total = total - part if subtract else total + part
    return StatisticsArrays.of(total), density.pool(total)
