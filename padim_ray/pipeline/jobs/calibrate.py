"""The calibration pass of a new version: training images' leave-one-out scores, group by group."""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pyarrow as pa

from padim_ray.densities import MIN_LEFT_OUT_OF
from padim_ray.images.shards import sample_images, shard_rows, shard_table
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import save_calibration
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.pipeline.graphs import scored_shards
from padim_ray.pipeline.stages.count import CountPixels
from padim_ray.planning.batches import images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.options.common import RunOptions
from padim_ray.runs.summary import warn
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import BINS


@dataclass(frozen=True)
class Sample:
    """The training images that calibrate a group: at most so many, chosen by the seed."""

    calibration_images: int
    seed: int


def calibrate(
    manifest: pa.Table, version: ModelVersion, sample: Sample, options: RunOptions, plan: Plan
) -> tuple[dict[str, GroupEntry], np.ndarray, int]:
    """Calibrate a version that is about to be published.

    Args:
        manifest: the images in the moments.

    Returns:
        The version's groups with their numbers of calibrated images, the leave-one-out score of
        each image of the manifest, float32, NaN where it isn't in the sample or can't be read any
        more, and the number of images in the sample.
    """
    missing: list[str] = []
    scores = np.full(manifest.num_rows, np.nan, np.float32)
    entries = dict(version.groups)
    rows = sample_images(manifest, sample.calibration_images, sample.seed)
    groups = manifest["group"].take(rows).to_pylist()
    rows = rows[[entries[group].images >= MIN_LEFT_OUT_OF for group in groups]]
    if not len(rows):
        return entries, scores, 0
    with data_context(preserve_order=True):
        images = manifest.take(rows)
        per_shard = images_per_shard(images.num_rows, version.spec.preprocessing)
        shards = shard_rows(images, per_shard)
        tables = [shard_table(images, *shard) for shard in enumerate(shards)]
        count = CountPixels(version.spec.mapper)
        counted = scored_shards(tables, version, options, plan, count, leave_one_out=True)
        with rows_of(counted) as all_parts:
            for group, parts in groupby(all_parts, key=lambda part: part["group"]):
                pixels = np.zeros(BINS, np.int64)
                here = []
                for part in parts:
                    where = rows[shards[part["shard"]]]
                    here.extend(where)
                    scores[where] = np.frombuffer(part["scores"], np.float32)
                    pixels += np.frombuffer(part["pixels"], np.int64)
                valid = np.sort(scores[here][np.isfinite(scores[here])])
                if len(valid):
                    calibration = Calibration(valid, pixels)
                    save_calibration(version.root, version.number, group, calibration)
                if len(valid) < len(here):
                    missing.append(_describe(group, len(valid), len(here)))
                entries[group] = replace(entries[group], calibrated=len(valid))
    warn(missing)
    return entries, scores, len(rows)


def _describe(group: str, read: int, sampled: int) -> str:
    """Why a group's thresholds rest on fewer images than they might."""
    if read:
        return (
            f"Group {group!r}: of the {sampled} images that calibrate it, {sampled - read} can't "
            "be read any more: its thresholds and p-values hold for images like the others"
        )
    return (
        f"Group {group!r} isn't calibrated, and has no thresholds and no p-values: none of the "
        f"{sampled} images of its sample can be read any more"
    )
