"""Ray tasks that write groups' files: fitted densities, copies of other models, unfinished sums."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import ray

from padim_ray.densities.base import Density, Pooled
from padim_ray.errors import ModelError
from padim_ray.features.grid import split_cells
from padim_ray.model.draft import DraftVersion
from padim_ray.model.files import load_tensors
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import save_calibration, save_tensors
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.memory import give_back_memory, prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.base import check_shards
from padim_ray.pipeline.merging.codec import StatisticsArrays, read_statistics
from padim_ray.pipeline.merging.tree import Merged, Source
from padim_ray.planning.resources import Share
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


@dataclass(frozen=True)
class Writing:
    """A group whose density is being fitted and written by tasks.

    Attributes:
        group: the group's name.
        entry: its entry for model.json.
        tasks: one per shard.
    """

    group: str
    entry: GroupEntry
    tasks: Sequence[ray.ObjectRef]

    def finish(self, draft: DraftVersion) -> None:
        """Wait for the tasks.

        Raises:
            ModelError: if the density can't be fitted, or a file isn't there.
            RuntimeError: if an image is lost or counted twice.
        """
        for problem in filter(None, ray.get(list(self.tasks))):
            raise ModelError(problem)
        draft.check_written(self.group)


def start_writing(
    group: str, merged: Mapping[int, Merged], entry: GroupEntry, draft: DraftVersion, share: Share
) -> Writing:
    """Start to fit a group's density, and to write it and the statistics to the draft.

    Args:
        group: the group's name.
        merged: its statistics by shard number.
        entry: says how many images each shard must have.
        draft: the version that is being written.
        share: resources of a task.
    """
    pooled = _check_task.options(**share.options).remote(
        group, entry.images, draft.shards, *[part.pooled for part in merged.values()]
    )
    task = _write_task.options(**share.options)
    tasks = [
        task.remote(part.source.row, part.source.ref, pooled, draft, group, shard)
        for shard, part in merged.items()
    ]
    return Writing(group, entry, tasks or [pooled])


def check_counts(group: str, merged: Mapping[int, Merged], count: int, shards: int) -> None:
    """Check that the statistics have every image once.

    Raises:
        RuntimeError: if an image is lost or counted twice.
    """
    _pool(group, count, shards, ray.get([part.pooled for part in merged.values()]))


@ray.remote(max_retries=-1)
def _check_task(group: str, count: int, shards: int, *pools: Pooled) -> Pooled:
    return _pool(group, count, shards, pools)


def _pool(group: str, count: int, shards: int, pools: Sequence[Pooled]) -> Pooled:
    counts = {pool.count for pool in pools}
    if len(pools) != shards or counts != {count}:
        raise RuntimeError(
            f"Group {group!r}: {count} images should be in {shards} shards of statistics, but "
            f"{sorted(counts)} are in {len(pools)}"
        )
    return reduce(add, pools)


@ray.remote(max_retries=-1)
def _write_task(
    row: int | None, value: Any, pooled: Pooled, draft: DraftVersion, group: str, shard: int
) -> str | None:
    """Fit and write one shard; return the user's problem, if there is one."""
    prepare_memory()
    density = draft.spec.density
    statistics = read_statistics(density, row, value)
    if shard < draft.density_shards:
        try:
            with stage("factorise", statistics.count):
                fitted = density.fit(statistics, pooled)
        except ModelError as error:
            return f"Group {group!r} {error}"
        draft.save_density(group, shard, fitted)
        del fitted
    draft.save_statistics(group, shard, statistics)
    del statistics
    give_back_memory()
    return None


def copy_groups(
    holders: Mapping[str, ModelVersion], draft: DraftVersion, share: Share
) -> dict[str, GroupEntry]:
    """Copy groups of other models' versions to the draft, with their calibrations.

    Args:
        holders: the versions that have them, by group.
        draft: the version that is being written.
        share: resources of a task; there is one task per shard.

    Returns:
        The groups' entries for model.json.

    Raises:
        ModelError: if a version has another number of shards.
    """
    for group, version in holders.items():
        check_shards(version, group, draft.shards)
    task = _copy_task.options(**share.options)
    ray.get(
        [
            task.remote(version, group, shard, draft)
            for group, version in holders.items()
            for shard in range(draft.shards)
        ]
    )
    return {group: replace(each.groups[group], version=None) for group, each in holders.items()}


@ray.remote(max_retries=-1)
def _copy_task(version: ModelVersion, group: str, shard: int, draft: DraftVersion) -> None:
    """Copy one shard by reading and writing it; the task of shard 0 also copies the calibration."""
    prepare_memory()
    draft.save_statistics(group, shard, version.load_statistics(group, shard))
    if shard < draft.density_shards:
        draft.save_density(group, shard, version.load_density(group, shard))
    calibration = version.load_calibration(group) if shard == 0 else None
    if calibration:
        save_calibration(draft.root, draft.number, group, calibration)
    give_back_memory()


def save_unfinished(density: Density, part: Merged, file: Location, share: Share) -> ray.ObjectRef:
    """Start a task that saves merged statistics of an unfinished group; return its reference."""
    task = _save_task.options(**share.options)
    return task.remote(density, part.source.row, part.source.ref, file)


@ray.remote(max_retries=-1)
def _save_task(density: Density, row: int | None, value: Any, file: Location) -> None:
    prepare_memory()
    save_tensors(file, read_statistics(density, row, value).packed())


def load_unfinished(draft: DraftVersion, shard: int, file: Location, share: Share) -> Source:
    """Start a task that loads a shard that `save_unfinished` wrote."""
    return Source(_load_task.options(**share.options).remote(draft, shard, file))


@ray.remote(max_retries=-1)
def _load_task(draft: DraftVersion, shard: int, file: Location) -> StatisticsArrays:
    prepare_memory()
    density, grid = draft.spec.density, draft.spec.grid
    run = split_cells(grid.cells[-1], draft.shards)[shard]
    expected = density.empty(grid, "meta").cells(*run).packed()
    return StatisticsArrays.of(load_tensors(draft.root, file, expected, density.unpack_statistics))
