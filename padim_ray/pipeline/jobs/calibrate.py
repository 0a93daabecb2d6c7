"""Calibrate a new version: leave-one-out scores of its training images, group by group.

Groups whose images' embeddings were kept from the first pass are measured from these. The images of
the others are fetched and embedded once more.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from operator import add, itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from padim_ray.images.fetch import is_unfetched
from padim_ray.images.manifest import group_counts
from padim_ray.images.shards import sample_images, shard_rows, shard_table
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import save_calibration
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.recovery import is_cluster_failure
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.pipeline.graphs import scored_shards
from padim_ray.pipeline.merging.kept import Kept
from padim_ray.pipeline.stages.count import CountPixels
from padim_ray.pipeline.stages.measure import LeftOut, start_measuring
from padim_ray.planning.batches import images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.failures import Failures
from padim_ray.runs.options.common import RunOptions
from padim_ray.runs.summary import warn
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import BINS

log = logging.getLogger("padim_ray")


@dataclass(frozen=True)
class Sample:
    """The choice of training images that calibrate a group.

    Attributes:
        calibration_images: maximum number per group.
        seed: of the random choice.
    """

    calibration_images: int
    seed: int

    def draw(self, manifest: pa.Table) -> np.ndarray:
        """The rows of a sorted manifest's images in the sample, ascending."""
        if not self.calibration_images:  # otherwise all URIs would be hashed for nothing
            return np.empty(0, int)
        return sample_images(manifest, self.calibration_images, self.seed)


def calibrate(
    images: pa.Table,
    version: ModelVersion,
    options: RunOptions,
    plan: Plan,
    kept: Mapping[str, Sequence[Kept]],
) -> tuple[dict[str, GroupEntry], np.ndarray]:
    """Calibrate a version that is about to be published, and save each group's calibration.

    Args:
        images: the training images in the sample, sorted, of groups that are large enough.
        version: the version.
        options: of the run.
        plan: how the cluster is divided.
        kept: embeddings by group. A group's are used if they are of all of its images in the
            sample.

    Returns:
        The version's groups with their numbers of calibration images; and the images' leave-one-out
        scores (n,) float32, NaN for those that can't be read any more.

    Raises:
        TooManyFailed: if images couldn't be fetched. Images that are gone or may not be read are
            left out: they may have been deleted since they were fitted, and signatures of presigned
            URIs aren't stored.
    """
    scores = np.full(images.num_rows, np.nan, np.float32)
    entries = dict(version.groups)
    problems: list[str] = []

    def take(group: str, rows: np.ndarray, found: np.ndarray, pixels: np.ndarray) -> None:
        scores[rows] = found
        valid = np.sort(found[np.isfinite(found)])
        if len(valid):
            save_calibration(version.root, version.number, group, Calibration(valid, pixels))
        if len(valid) < len(found):
            problems.append(_describe_problem(group, len(valid), len(found)))
        entries[group] = replace(entries[group], calibrated=len(valid))

    left = np.ones(images.num_rows, bool)
    for group, rows, left_out in _from_kept(images, version, plan, kept):
        take(group, rows, left_out.scores, left_out.pixels)
        left[rows] = False
    for group, rows, found, pixels in _from_images(
        images, left.nonzero()[0], version, options, plan
    ):
        take(group, rows, found, pixels)
    warn(problems)
    return entries, scores


def _from_kept(
    images: pa.Table, version: ModelVersion, plan: Plan, kept: Mapping[str, Sequence[Kept]]
) -> Iterator[tuple[str, np.ndarray, LeftOut]]:
    """Yield groups, the rows of their images, and the results from kept embeddings."""
    tasks = {
        group: start_measuring(group, kept[group], version, plan)
        for group in group_counts(images)
        if group in kept
    }
    start = 0
    for group, count in group_counts(images).items():
        uris = images["uri"].slice(start, count).to_pylist()
        try:
            parts = ray.get(tasks.pop(group, []))
        except RayError as error:
            if not is_cluster_failure(error):
                raise
            log.warning("Embeddings are lost with a node: images are read again to calibrate")
            return
        row = {uri: start + at for at, uri in enumerate(uris)}
        start += count
        if parts and {uri for part in parts for uri in part.uris} == row.keys():
            found = reduce(add, parts)
            yield group, np.array([row[uri] for uri in found.uris]), found


def _from_images(
    images: pa.Table, rows: np.ndarray, version: ModelVersion, options: RunOptions, plan: Plan
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Read some rows' images again; yield groups, their rows, scores and histograms."""
    if not len(rows):
        return
    images = images.take(rows)
    shards = shard_rows(images, images_per_shard(images.num_rows, version.spec.preprocessing))
    tables = [shard_table(images, *shard) for shard in enumerate(shards)]
    count = CountPixels(version.spec.mapper)
    failures = Failures(options, len(rows))
    with data_context(preserve_order=True):
        counted = scored_shards(tables, version, options, plan, count, leave_one_out=True)
        with rows_of(counted) as all_parts:
            counted_parts = _count_unfetched(all_parts, shards, failures)
            for group, parts in groupby(counted_parts, key=itemgetter("group")):
                where, scores, pixels = _join(parts, shards)
                yield group, rows[where], scores, pixels
    failures.check_fetched()


def _count_unfetched(
    parts: Iterable[Mapping[str, Any]], shards: Sequence[slice], failures: Failures
) -> Iterator[Mapping[str, Any]]:
    """Pass on the rows of `CountPixels`, and count their unfetched images."""
    for part in parts:
        shard = shards[part["shard"]]
        causes = dict(part["causes"])
        causes.pop("fetch: permission denied", None)
        unfetched = {cause: n for cause, n in causes.items() if is_unfetched(cause)}
        failures.add(shard.stop - shard.start, unfetched)
        yield part


def _join(
    parts: Iterable[Mapping[str, Any]], shards: Sequence[slice]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join a group's rows of `CountPixels`.

    Returns:
        The images' positions in the sample, their scores, and the histogram of their maps.
    """
    where, scores, pixels = [], [], np.zeros(BINS, np.int64)
    for part in parts:
        shard = shards[part["shard"]]
        where.append(np.arange(shard.start, shard.stop))
        scores.append(np.frombuffer(part["scores"], np.float32))
        pixels += np.frombuffer(part["pixels"], np.int64)
    return np.concatenate(where), np.concatenate(scores), pixels


def _describe_problem(group: str, read: int, sampled: int) -> str:
    """Say that a group is calibrated with fewer images than were sampled."""
    if read:
        return (
            f"Group {group!r}: of the {sampled} images sampled to calibrate it, {sampled - read} "
            "can't be read any more: thresholds and p-values hold for images like the others"
        )
    return (
        f"Group {group!r} isn't calibrated, so it has no thresholds and no p-values: none of the "
        f"{sampled} sampled images can be read any more"
    )
