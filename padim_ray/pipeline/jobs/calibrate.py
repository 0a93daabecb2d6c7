"""Calibrate a new version: leave-one-out scores of its training images, group by group."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from padim_ray.densities import MIN_LEFT_OUT_OF
from padim_ray.images.fetch import is_unfetched
from padim_ray.images.shards import sample_images, shard_rows, shard_table
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import save_calibration
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.pipeline.graphs import scored_shards
from padim_ray.pipeline.stages.count import CountPixels
from padim_ray.planning.batches import images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.failures import Failures
from padim_ray.runs.options.common import RunOptions
from padim_ray.runs.summary import warn
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import BINS


@dataclass(frozen=True)
class Sample:
    """The choice of training images that calibrate a group.

    Attributes:
        calibration_images: maximum number per group.
        seed: of the random choice.
    """

    calibration_images: int
    seed: int


def calibrate(
    manifest: pa.Table, version: ModelVersion, sample: Sample, options: RunOptions, plan: Plan
) -> tuple[dict[str, GroupEntry], np.ndarray, int]:
    """Calibrate a version that is about to be published, and save each group's calibration.

    Args:
        manifest: the images in the moments, sorted.
        version: the version.
        sample: the choice of images.
        options: of the run.
        plan: how the cluster is divided.

    Returns:
        The version's groups with their numbers of calibration images; the manifest's leave-one-out
        scores (n,) float32, NaN for images outside the sample and those that can't be read any
        more; and the number of images in the sample.

    Raises:
        TooManyFailed: if images couldn't be fetched. Images that are gone or may not be read are
            left out: they may have been deleted since they were fitted, and signatures of presigned
            URIs aren't stored.
    """
    scores = np.full(manifest.num_rows, np.nan, np.float32)
    entries = dict(version.groups)
    problems: list[str] = []
    rows = _sample_rows(manifest, version, sample)
    if not len(rows):
        return entries, scores, 0
    images = manifest.take(rows)
    shards = shard_rows(images, images_per_shard(images.num_rows, version.spec.preprocessing))
    tables = [shard_table(images, *shard) for shard in enumerate(shards)]
    count = CountPixels(version.spec.mapper)
    failures = Failures(options, len(rows))
    with data_context(preserve_order=True):
        counted = scored_shards(tables, version, options, plan, count, leave_one_out=True)
        with rows_of(counted) as all_parts:
            counted_parts = _count_unfetched(all_parts, shards, failures)
            for group, parts in groupby(counted_parts, key=itemgetter("group")):
                where, sampled, pixels = _join(parts, shards)
                scores[rows[where]] = sampled
                valid = np.sort(sampled[np.isfinite(sampled)])
                if len(valid):
                    calibration = Calibration(valid, pixels)
                    save_calibration(version.root, version.number, group, calibration)
                if len(valid) < len(sampled):
                    problems.append(_describe_problem(group, len(valid), len(sampled)))
                entries[group] = replace(entries[group], calibrated=len(valid))
    failures.check_fetched()
    warn(problems)
    return entries, scores, len(rows)


def _sample_rows(manifest: pa.Table, version: ModelVersion, sample: Sample) -> np.ndarray:
    """The manifest's rows of sampled images, without groups too small for leave-one-out."""
    rows = sample_images(manifest, sample.calibration_images, sample.seed)
    groups = manifest["group"].take(rows).to_pylist()
    return rows[[version.groups[group].images >= MIN_LEFT_OUT_OF for group in groups]]


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
