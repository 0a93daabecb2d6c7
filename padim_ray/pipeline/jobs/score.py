"""The score job: images in; scores, verdicts, heatmaps, anomaly maps and a report out."""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import pyarrow as pa

from padim_ray.errors import NoImages, PadimError
from padim_ray.images.manifest import NO_IMAGES, group_counts
from padim_ray.model.layout import current_number, split_name
from padim_ray.model.readers import reading
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.pipeline.cluster.session import ray_session
from padim_ray.pipeline.jobs.scoring_run import ScoringJob
from padim_ray.planning.batches import images_per_shard
from padim_ray.runs import run_directory
from padim_ray.runs.job_record import JobRecord, identify
from padim_ray.runs.listing import read_images_table
from padim_ray.runs.options.common import ImagesOptions, from_mapping
from padim_ray.runs.options.score import ScoreOptions, ScoringOptions
from padim_ray.runs.summary import Summary, read_summary
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

Listing = TypeVar("Listing", bound=ImagesOptions)
Scoring = TypeVar("Scoring", bound=ScoringOptions)
log = logging.getLogger("padim_ray")
_MODEL = ("model", "model_version", "model_sha256")
"""The names of a run's model in its identity."""


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
        scoring_job("score", options, read_images_to_score, options.retry_failed) as job,
    ):
        if not job.is_complete:
            job.run()
        return job.finish()


def read_images_to_score(options: ScoreOptions) -> pa.Table:
    """List the images; none if there are none and --allow-empty says that this is no mistake."""
    try:
        return read_images_table(options)
    except NoImages as error:
        if not options.allow_empty:
            raise
        log.warning("%s", error)
        return NO_IMAGES


@contextmanager
def scoring_job(
    name: str,
    options: Scoring,
    read_manifest: Callable[[Scoring], pa.Table],
    retry_failed: Collection[str] = (),
) -> Iterator[ScoringJob]:
    """Open a scoring run, a new one or one to continue, and claim its directory for the block.

    A run is continued with the version of the model that it was begun with, unless `options` name
    another one.

    Args:
        name: "score" or "evaluate".
        options: of the run.
        read_manifest: lists the images.
        retry_failed: beginnings of the errors of images to score again, in a complete run as well.

    Raises:
        PadimError: for every mistake that is known before anything slow happens; if the directory
            holds another run; if another job is writing to it.
    """
    started = datetime.now(UTC), time.monotonic()
    root = Location.of(options.out, options.storage_options)
    with ExitStack() as stack:
        claim = stack.enter_context(claimed(root, name))
        root = claim.root
        record = None if options.overwrite else JobRecord.read(root)
        begun_with = _begun_with(record) if record else None
        version_name = version_to_continue(options.model, begun_with, options.storage_options)
        is_complete = record is not None and run_directory.is_complete(root)
        reopens = is_complete and _has_failed(root, retry_failed)
        if record and version_name == begun_with and is_complete and not reopens:
            # nothing is left to do, even if the version has been pruned since
            version, model = None, {key: record.identity[key] for key in _MODEL}
        else:
            version = open_named(version_name, options.storage_options)
            stack.enter_context(reading(version, name))
            version.load_trunk_weights()  # report missing weights here: actors would die of them
            values = (version.root.uri, version.number, version.fingerprint())
            model = dict(zip(_MODEL, values, strict=True))
        identity = identify(options, job=name, **model)
        if options.overwrite:
            run_directory.clear(root)
        if record:
            record = continue_run(record, identity, options, read_manifest, root)
            if reopens:
                (root / run_directory.COMPLETE).remove()
        else:
            assert version  # only a complete run goes without it
            run_directory.check_empty(root)
            record = _begin(identity, read_manifest(options), version, root)
        job = ScoringJob(
            *(name, options, version_name, record, root, claim, *started),
            retry_failed=tuple(retry_failed),
            opened=version,
        )
        if not job.is_complete:
            stack.enter_context(ray_session(options.address))
            stack.enter_context(job.metrics)
        yield job


def version_to_continue(
    model: str, begun_with: str | None, storage_options: Mapping[str, Any] | None
) -> str:
    """Name the version of a model that a job takes.

    Args:
        model: as the command names it, with or without a version.
        begun_with: the version's name that an earlier attempt was begun with, if there was one.
        storage_options: of the model.

    Returns:
        `begun_with`, if that is a version of the model and the command names no other.
    """
    uri, named = split_name(model)
    root = Location.of(uri, storage_options)
    if begun_with is None or named is not None:
        return model
    begun_uri, number = split_name(begun_with)
    if begun_uri != root.uri:
        return model
    if (current := current_number(root)) != number:
        log.info(
            "The current version of %s is %s; the run stays with version %s, which it began with",
            *(root.uri, current, number),
        )
    return begun_with


def _begun_with(record: JobRecord) -> str | None:
    """Name the version that a run was begun with; None if the record is of another kind of job."""
    known = record.identity
    return f"{known['model']}@{known['model_version']}" if known.keys() >= set(_MODEL) else None


def _has_failed(root: Location, causes: Collection[str]) -> bool:
    """Whether a complete run has images that failed for one of these causes."""
    if not causes:
        return False
    failed = read_summary(root, {}).failed_by_cause
    count = sum(n for cause, n in failed.items() if cause.startswith(tuple(causes)))
    log.info("--retry-failed: %d of the images failed for these causes", count)
    return count > 0


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
