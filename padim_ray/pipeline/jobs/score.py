"""The score job: images in; scores, verdicts, heatmaps, anomaly maps and a report out."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import pyarrow as pa

from padim_ray.errors import PadimError
from padim_ray.images.manifest import group_counts
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.pipeline.cluster.session import ray_session
from padim_ray.pipeline.jobs.scoring_run import ScoringJob
from padim_ray.planning.batches import images_per_shard
from padim_ray.runs import run_directory
from padim_ray.runs.job_record import JobRecord, identify
from padim_ray.runs.listing import read_images_table
from padim_ray.runs.options.common import ImagesOptions, from_mapping
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.runs.summary import Summary
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

Listing = TypeVar("Listing", bound=ImagesOptions)
Scoring = TypeVar("Scoring", bound=ScoreOptions)
log = logging.getLogger("padim_ray")


def score(**options: Any) -> Summary:
    """Score images with a fitted model.

    Args:
        options: the fields of `ScoreOptions`, named as on the command line:
            `padim_ray.score(images="new/{group}/*.png", model="models/line7", out="results/1")`.

    Raises:
        PadimError: for a mistake in the options, a group that the model doesn't know, or an output
            directory that already holds results.
    """
    return run_score(from_mapping(ScoreOptions, options))


def run_score(options: ScoreOptions) -> Summary:
    """Score as `options` say; see `score`."""
    with (
        hidden_credentials(options.storage_options),
        scoring_job("score", options, read_images_table) as job,
    ):
        if not job.is_complete:
            job.run()
        return job.finish()


@contextmanager
def scoring_job(
    name: str, options: Scoring, read_manifest: Callable[[Scoring], pa.Table]
) -> Iterator[ScoringJob]:
    """Open a scoring run, a new one or one to continue, and claim its directory for the block.

    Args:
        name: "score" or "evaluate".
        options: of the run.
        read_manifest: lists the images.

    Raises:
        PadimError: for every mistake that is known before anything slow happens; if the directory
            holds another run; if another job is writing to it.
    """
    started = datetime.now(UTC), time.monotonic()
    version = open_named(options.model, options.storage_options)
    version.load_trunk_weights()  # report missing weights here: actors would die of them
    root = Location.of(options.out, options.storage_options)
    identity = identify(
        options,
        job=name,
        model=version.root.uri,
        model_version=version.number,
        model_sha256=version.fingerprint(),
    )
    with claimed(root, name) as claim:
        if options.overwrite:
            run_directory.clear(root)
        record = JobRecord.read(root)
        if record:
            record = continue_run(record, identity, options, read_manifest, root)
        else:
            run_directory.check_empty(root)
            record = _begin(identity, read_manifest(options), version, root)
        job = ScoringJob(name, options, version, record, root, claim, *started)
        with ExitStack() as stack:
            if not job.is_complete:
                stack.enter_context(ray_session(options.address))
                stack.enter_context(job.metrics)
            yield job


def continue_run(
    record: JobRecord,
    identity: Mapping[str, Any],
    options: Listing,
    read_manifest: Callable[[Listing], pa.Table],
    root: Location,
) -> JobRecord:
    """Check that an earlier run is the one that is asked for, and return its record.

    An unfinished run continues with the images as they were listed. Otherwise the same command
    would never finish in an archive that grows.

    Raises:
        PadimError: if the earlier run had other options, another model or other images.
    """
    is_complete = run_directory.is_complete(root)
    place = f"{root.uri} holds {'a run' if is_complete else 'an unfinished run'}"
    record.check_identity(identity, place)
    if options.manifest is not None or is_complete:
        return record.with_images(read_manifest(options), place)
    log.info("Continuing with the %d images that were listed", record.images.num_rows)
    return record


def _begin(
    identity: Mapping[str, Any], images: pa.Table, version: ModelVersion, root: Location
) -> JobRecord:
    """Write the record of a new run."""
    _check_groups(list(group_counts(images)), version)
    per_shard = images_per_shard(images.num_rows, version.spec.preprocessing)
    settings = {"images_per_shard": per_shard, "run": secrets.token_hex(8)}
    record = JobRecord(identity, settings, images)
    record.write(root)
    return record


def _check_groups(groups: list[str], version: ModelVersion) -> None:
    unknown = sorted(set(groups) - set(version.groups))
    if unknown:
        known = ", ".join(map(repr, list(version.groups)[:10]))
        raise PadimError(
            f"The model at {version.root.uri} has no group {unknown[0]!r}"
            + (f", nor {len(unknown) - 1} others that the images name" * (len(unknown) > 1))
            + f"; it has {known}{' …' * (len(version.groups) > 10)}"
        )
