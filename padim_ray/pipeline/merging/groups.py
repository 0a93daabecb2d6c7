"""Partial sums merged by a tree of tasks, then factorised and written, shard by shard.

The driver holds references only. Every key (group, state shard) is merged, factorised and written
on its own, anywhere in the cluster.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import safetensors.torch

from padim_ray.densities.gaussian import moments, whitening
from padim_ray.densities.gaussian.moments import Blocks
from padim_ray.densities.gaussian.regularization import PooledScatter, Regularization
from padim_ray.errors import ModelError
from padim_ray.model.layout import shard_location, version_location
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import save_calibration, save_tensors
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.memory import give_back_memory, prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.base import check_shards
from padim_ray.pipeline.merging.codec import MomentArrays, read_moments
from padim_ray.pipeline.merging.tree import Merged, Source
from padim_ray.planning.resources import Share
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


def factorise_and_write(
    group: str,
    merged: Mapping[int, Merged],
    count: int,
    regularization: Regularization,
    target: "Target",
    share: Share,
) -> None:
    """Write a group's moments and Gaussians into a version of the model.

    Args:
        merged: its state shards, by number.
        count: the images that must be in each of them.
        share: what a task asks for.

    Raises:
        ModelError: naming a group whose covariances can't be factorised.
        RuntimeError: if the moments are not of `count` images: an image lost, or counted twice.
    """
    pools = check_counts(group, merged, count, target.shards)
    offset = ray.put(regularization.offset(sum(pools[1:], pools[0])))
    written = [
        _write_task.options(**share.options).remote(
            part.source.row, part.source.ref, regularization, offset, target, group, shard
        )
        for shard, part in merged.items()
    ]
    for problem in filter(None, ray.get(written)):
        raise ModelError(problem)


def check_counts(
    group: str, merged: Mapping[int, Merged], count: int, shards: int
) -> list[PooledScatter]:
    """Make sure that every image is in the moments, once; the shards' scatters, summed over cells.

    Raises:
        RuntimeError: if an image was lost, or counted twice.
    """
    pools = ray.get([part.pooled for part in merged.values()])
    counts = {pool.count for pool in pools}
    if len(merged) != shards or counts != {count}:
        raise RuntimeError(
            f"Group {group!r}: {count} images should be in {shards} shards of moments, but "
            f"{sorted(counts)} are in {len(merged)}"
        )
    return pools


@dataclass(frozen=True)
class Target:
    """The version of a model that is being written, and how many state shards its groups have."""

    root: Location
    version: int
    shards: int

    @property
    def location(self) -> Location:
        return version_location(self.root, self.version)

    def file(self, group: str, kind: str, shard: int) -> Location:
        return shard_location(self.root, self.version, group, kind, shard, self.shards)

    def check_written(self, group: str) -> None:
        """Raises: ModelError if the driver doesn't find a file that a worker wrote."""
        for kind in ("moments", "gaussian"):
            for shard in range(self.shards):
                location = self.file(group, kind, shard)
                if not location.exists():
                    raise ModelError(
                        f"A worker wrote {location.uri}, which isn't there: on a cluster the model "
                        "needs storage that all nodes share"
                    )


@ray.remote(max_retries=-1)
def _write_task(
    row: int | None,
    value: Any,
    regularization: Regularization,
    offset: Blocks,
    target: Target,
    group: str,
    shard: int,
) -> str | None:
    """Factorise and write one state shard; return what is wrong, if anything."""
    prepare_memory()
    merged = read_moments(row, value)
    try:
        with stage("factorise", merged.count):
            whitened = whitening.factorise(merged, regularization.scale(merged.count), offset)
    except ModelError as error:
        return f"Group {group!r} {error}"
    save_tensors(target.file(group, "moments", shard), moments.to_tensors(merged))
    save_tensors(target.file(group, "gaussian", shard), whitening.to_tensors(whitened))
    del merged, whitened
    give_back_memory()
    return None


def copy_groups(
    holders: Mapping[str, ModelVersion], target: "Target", share: Share
) -> dict[str, GroupEntry]:
    """Write groups of other models' versions into this one as they are, calibration and all.

    Args:
        holders: by group.
        share: what a task asks for, of which there is one per state shard.

    Returns:
        Their entries.

    Raises:
        ModelError: if a version has its shards cut otherwise.
    """
    for group, version in holders.items():
        check_shards(version, group, target.shards)
    task = _copy_task.options(**share.options)
    ray.get(
        [
            task.remote(version, group, shard, target)
            for group, version in holders.items()
            for shard in range(target.shards)
        ]
    )
    return {group: replace(each.groups[group], version=None) for group, each in holders.items()}


@ray.remote(max_retries=-1)
def _copy_task(version: ModelVersion, group: str, shard: int, target: "Target") -> None:
    """Read and write, and so check, a shard; with the first one goes the calibration."""
    prepare_memory()
    state = moments.to_tensors(version.load_moments(group, shard))
    save_tensors(target.file(group, "moments", shard), state)
    whitened = whitening.to_tensors(version.load_gaussian(group, shard))
    save_tensors(target.file(group, "gaussian", shard), whitened)
    calibration = version.load_calibration(group) if shard == 0 else None
    if calibration:
        save_calibration(target.root, target.version, group, calibration)
    give_back_memory()


def save(part: Merged, file: Location, share: Share) -> ray.ObjectRef:
    """Write merged moments, by a task that asks for `share`."""
    return _save_task.options(**share.options).remote(part.source.row, part.source.ref, file)


@ray.remote(max_retries=-1)
def _save_task(row: int | None, value: Any, file: Location) -> None:
    prepare_memory()
    save_tensors(file, moments.to_tensors(read_moments(row, value)))


def load(file: Location, share: Share) -> Source:
    """Read them back."""
    return Source(_load_task.options(**share.options).remote(file))


@ray.remote(max_retries=-1)
def _load_task(file: Location) -> MomentArrays:
    prepare_memory()
    with file.as_local_file() as path:
        return MomentArrays.of(moments.from_tensors(safetensors.torch.load_file(path)))
