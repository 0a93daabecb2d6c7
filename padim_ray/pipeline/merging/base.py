"""The published versions that new statistics are added to, or subtracted from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import ray
import torch

from padim_ray.densities.gaussian import moments
from padim_ray.densities.gaussian.regularization import PooledScatter, pool
from padim_ray.errors import ModelError
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.merging.codec import MomentArrays, read_moments
from padim_ray.pipeline.merging.tree import Merged, Source
from padim_ray.planning.resources import Share


@dataclass(frozen=True)
class Base:
    """What there is already: versions whose moments images are added to, or taken from.

    `left_out`: of the versions, by index, groups that don't count. `summed`: groups that are
    written anew even if no image is added or taken, because several versions have them. `copied`:
    groups whose files are copied, because another model has them. To all others' files the new
    version only refers.
    """

    versions: tuple[ModelVersion, ...] = ()
    takes: bool = False
    left_out: frozenset[tuple[int, str]] = frozenset()
    summed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        return sorted({group for version in self.versions for group in version.groups})

    def images(self, group: str) -> int:
        """In the group's moments, over all versions."""
        return sum(version.groups[group].images for version in self.holders(group))

    def combine(
        self, group: str, merged: Mapping[int, Merged], shards: int, share: Share
    ) -> dict[int, Merged]:
        """Add a group's state shards to those of the versions, or take them from there.

        Args:
            merged: sums of images, by number of the shard; empty if there are none.

        Raises:
            ModelError: if a version has its shards cut otherwise.
        """
        versions = self.holders(group)
        for version in versions:
            check_shards(version, group, shards)
        task = _combine_task.options(**share.options, num_returns=2)
        combined = {}
        for shard in range(shards):
            part = (merged[shard].source.row, merged[shard].source.ref) if merged else (None, None)
            state, pooled = task.remote(versions, group, shard, self.takes, *part)
            combined[shard] = Merged(Source(state), pooled)
        return combined

    def holders(self, group: str) -> list[ModelVersion]:
        """The versions that have a group, with nothing of others: tasks are sent them."""
        return [
            replace(version, groups={group: version.groups[group]})
            for index, version in enumerate(self.versions)
            if group in version.groups and (index, group) not in self.left_out
        ]


def check_shards(version: ModelVersion, group: str, shards: int) -> None:
    """Raises: ModelError if the group is cut into another number of shards."""
    if version.groups[group].shards != shards:
        raise ModelError(
            f"{version.root.uri} was written by another padim-ray: it has group {group!r} "
            f"in {version.groups[group].shards} shards, not {shards}; fit it again"
        )


@ray.remote(max_retries=-1)
def _combine_task(
    versions: Sequence[ModelVersion],
    group: str,
    shard: int,
    takes: bool,
    row: int | None,
    value: Any,
) -> tuple["MomentArrays", PooledScatter]:
    prepare_memory()
    # one after the other: memory for two, however many models are merged
    parts = (version.load_moments(group, shard).to(torch.float64) for version in versions)
    total = reduce(moments.merge, parts)
    if value is not None:
        part = read_moments(row, value).to(torch.float64)
        total = moments.subtract(total, part) if takes else moments.merge(total, part)
    return MomentArrays.of(total), pool(total)
