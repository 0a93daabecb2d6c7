"""What fit, update, forget and merge share: making a new version of a model.

The images' statistics accumulate round after round, and are added to those of the base versions or
subtracted from them. Then the changed groups are calibrated, and the version becomes current.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.densities import MIN_LEFT_OUT_OF
from padim_ray.errors import PadimError
from padim_ray.images.manifest import TEXT, group_counts, sort_images
from padim_ray.images.sources import FETCHED, without_sources
from padim_ray.model.draft import DraftVersion
from padim_ray.model.layout import (
    check_number,
    current_number,
    is_published,
    next_number,
    version_location,
    version_numbers,
)
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import make_current, publish, remove_manifests
from padim_ray.model.rounds import Round, remove_rounds
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import OUTCOMES, ModelVersion, open_version
from padim_ray.pipeline.cluster.nodes import plan_for
from padim_ray.pipeline.cluster.prometheus import JobMetrics
from padim_ray.pipeline.cluster.recovery import until_done
from padim_ray.pipeline.cluster.session import ray_session
from padim_ray.pipeline.cluster.spilling import spilling
from padim_ray.pipeline.graphs import partial_sums_of
from padim_ray.pipeline.jobs.calibrate import Sample, calibrate
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.pipeline.merging.reducer import Reducer
from padim_ray.planning.batches import embedding_bytes, kept_groups
from padim_ray.planning.forecast import State, fit_objects_at_once
from padim_ray.planning.resources import Plan
from padim_ray.runs.failures import Failures, count_causes
from padim_ray.runs.job_record import JOB, JobRecord
from padim_ray.runs.options.common import ImagesOptions
from padim_ray.runs.options.fit import RoundOptions
from padim_ray.runs.pushgateway import push_outcome
from padim_ray.runs.summary import Summary, timed
from padim_ray.storage.claim import Claim
from padim_ray.storage.disk import disk_usage, format_size
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


@dataclass(kw_only=True)
class Job(ABC):
    """A job that makes a version; `run` starts it, or continues one that was killed.

    Attributes:
        name: name of the command.
        options: of the job.
        root: directory of the model.
        claim: on `root`.
        sample: the choice of images that calibrate a group.
        identity: options and inputs that an attempt must share to continue this job.
        why: description of the version, with {} for the number of images.
        base: versions that images are added to or subtracted from.
        calibrates: whether the groups that change are calibrated.
        embedding_memory: bytes of images' embeddings that are kept to calibrate their groups.
        skipped: number of listed images that are in the model already.
        sampled: number of images in the calibration sample.
        calibrated: number of them that could be read.
        started: start of this attempt on the monotonic clock.
        stages: seconds of each stage.
    """

    name: str
    options: RoundOptions
    root: Location
    claim: Claim
    sample: Sample
    identity: Mapping[str, Any]
    why: str
    base: BaseVersions = field(default_factory=BaseVersions)
    calibrates: bool = True
    embedding_memory: int = 0
    skipped: int = 0
    sampled: int = 0
    calibrated: int = 0
    started: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def list_images(self) -> pa.Table:
        """List the images to add or subtract: a sorted manifest."""

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Settings that are chosen when the job begins; an attempt that continues it keeps them."""
        return {}

    @abstractmethod
    def prepare(self, settings: Mapping[str, Any]) -> ModelSpec:
        """Store the trunk's weights in the model, and return the version's spec."""

    def kept(self, images: pa.Table) -> pa.Table | None:
        """Rows of the base's manifests that the new manifest keeps; None: there is no base."""
        return None

    def is_done(self, images: pa.Table) -> bool:
        """Whether there is nothing to do with these images."""
        return not images.num_rows

    def check_calibration(self, manifest: pa.Table) -> None:
        """Warn of limits of the calibration, given the version's manifest."""
        return

    def run(self) -> Summary:
        """Make the version, or what is left to do of it."""
        if (summary := self._repeat()) is not None:
            return summary
        number = number_to_make(self.root, afresh=self.options.overwrite)
        place = version_location(self.root, number)
        if self.options.overwrite:
            _abandon_unfinished(self.root)
        record = JobRecord.read(place, self.root)
        if record:
            record = self._continue(record)
            if is_published(self.root, number):  # but the job was killed before it became current
                make_current(self.root, number)
                remove_rounds(place)
                return self.nothing_left(number, record.images)
            remove_manifests(self.root, number)
        images = record.images if record else self.list_images()
        if not record and self.is_done(images):
            log.info("Nothing is left to do")
            return self.summarise(check_number(self.root), images, {}, before=0)
        with ray_session(self.options.address):
            plan = plan_for(self.options)
            if record is None:
                place.remove_all()
                record = JobRecord(self.identity, self.settings(plan), images)
                record.write(place)
            spec = self.prepare(record.settings)
            self._announce(place, spec, images)
            with (
                spilling(self._objects_at_once(spec, images, plan)),
                JobMetrics(
                    self.name, self.root.uri, number, group_counts(images), images.nbytes
                ) as metrics,
            ):
                before, causes = _NewVersion(self, number, spec, images, metrics).make()
        remove_rounds(place)
        summary = self.summarise(number, images, causes, before)
        push_outcome(summary, self.root.uri)
        return summary

    def _announce(self, place: Location, spec: ModelSpec, images: pa.Table) -> None:
        """Log what will be written, and check that a local disk has room for the rest of it.

        Raises:
            PadimError: if it hasn't.
        """
        state, last = State.of(spec), Round.latest(place, self.root)
        statistics, density = state.stored_statistics, state.stored_density
        groups = {*group_counts(images), *self.base.rewritten, *self.base.copied}
        log.info(
            "A group takes %s on storage (statistics %s, density %s); groups to write: %d, with %s",
            *map(format_size, (statistics + density, statistics, density)),
            *(len(groups), format_size(len(groups) * (statistics + density))),
        )
        if not self.root.is_local:
            return
        # a round is deleted when the next one is written
        rounds = 0 if images.num_rows <= self.options.round_images else 1 if last.partial else 2
        needed = len(groups - set(last.groups)) * (statistics + density) + rounds * statistics
        _, free = disk_usage(self.root.uri)
        if needed > free:
            raise PadimError(
                f"{self.root.uri} needs {format_size(needed)} more, and its disk has "
                f"{format_size(free)} free: make room and repeat the command, or choose another "
                "--model, fewer --n-features or a smaller --image-size"
            )

    def _objects_at_once(self, spec: ModelSpec, images: pa.Table, plan: Plan) -> int:
        """Bytes in the object stores at the same time."""
        kept = sum(self.kept_images(group_counts(images), spec).values()) * embedding_bytes(spec)
        added = fit_objects_at_once(
            group_counts(images), images.nbytes, spec, plan, self.options.round_images, kept
        )
        return added + (State.of(spec).merged if self.base.versions else 0)

    def kept_images(self, groups: Mapping[str, int], spec: ModelSpec) -> dict[str, int]:
        """How many images' embeddings are kept to calibrate their groups, by group."""
        most = self.sample.calibration_images if self.calibrates else 0
        new = {group: count for group, count in groups.items() if not self.base.images(group)}
        kept = kept_groups(new, spec, most, self.embedding_memory)
        return {group: min(new[group], most) for group in kept}

    def repeated_images(self, record: JobRecord) -> pa.Table | None:
        """The images of a finished job with the same identity; None if this job's differ."""
        return record.images

    def _repeat(self) -> Summary | None:
        """Report the current version, if this job has made it already."""
        current = current_number(self.root)
        if current is None or self.options.overwrite:
            return None
        record = JobRecord.read(version_location(self.root, current), self.root)
        if record is None or dict(record.identity) != dict(self.identity):
            return None
        images = self.repeated_images(record)
        if images is None:
            return None
        log.info("Nothing is left to do; --overwrite repeats the job")
        return self.nothing_left(current, images)

    def _continue(self, record: JobRecord) -> JobRecord:
        """Check that an unfinished job is the one that is asked for, and return its record.

        It continues with the images as they were listed. Otherwise the same command would never
        finish in an archive that grows.
        """
        place = f"{self.root.uri} holds an unfinished {record.identity.get('job')}"
        record.check_identity(self.identity, place)
        if isinstance(self.options, ImagesOptions) and self.options.manifest is not None:
            return record.with_images(self.list_images(), place)
        log.info("Continuing with the %d images that were listed", record.images.num_rows)
        return record

    def nothing_left(self, number: int, images: pa.Table) -> Summary:
        """Report a version that an earlier attempt made."""
        manifest = with_outcomes(open_version(self.root, number).load_manifest())
        here = pc.is_in(manifest["uri"], images["uri"])  # others failed earlier
        causes = count_causes(manifest.filter(here)["error"].to_pylist())
        return self.summarise(number, images, causes, before=images.num_rows)

    def summarise(
        self, number: int, images: pa.Table, causes: Mapping[str, int], before: int
    ) -> Summary:
        """Make the summary and log it."""
        summary = Summary(
            job=self.name,
            listed=images.num_rows,
            failed_by_cause=dict(Counter(causes).most_common()),
            groups=group_counts(images),
            before=before,
            seconds=time.monotonic() - self.started,
            skipped=self.skipped,
            sampled=self.sampled,
            calibrated=self.calibrated,
            stages=self.stages,
            places={"model": f"{self.root.uri} (version {number})"},
        )
        summary.report()
        return summary


def number_to_make(root: Location, *, afresh: bool) -> int:
    """The number of the version to make, or to continue.

    A new version takes a number that no directory has: tasks of a job that lost its claim may
    still be writing to the one that they know.

    Args:
        root: the model's directory.
        afresh: whether an unfinished version is abandoned.
    """
    last = next_number(root) - 1
    is_current = last <= (current_number(root) or 0)
    if not (afresh or is_current) and Round.latest(version_location(root, last), root).number:
        return last  # it is published, but the job was killed before it became current
    numbers = version_numbers(root)
    unfinished = [] if afresh else _unfinished(root)
    return max(unfinished, default=max(numbers, default=0) + 1)


def _unfinished(root: Location) -> list[int]:
    """The versions that jobs began after the last one was published."""
    last = next_number(root) - 1
    later = [number for number in version_numbers(root) if number > last]
    return [number for number in later if (version_location(root, number) / JOB).exists()]


def _abandon_unfinished(root: Location) -> None:
    for number in _unfinished(root):
        place = version_location(root, number)
        (place / JOB).remove()  # first: without it, a half-deleted attempt isn't continued
        place.remove_all()


@dataclass(frozen=True)
class _NewVersion:
    """A version that is being made; `make` does what is left to do, and publishes it.

    Attributes:
        job: the job that makes it.
        number: the version's number.
        spec: the version's spec.
        images: the images to add or subtract.
        metrics: the job's metrics.
    """

    job: Job
    number: int
    spec: ModelSpec
    images: pa.Table
    metrics: JobMetrics

    def make(self) -> tuple[int, Mapping[str, int]]:
        """Add the images, calibrate and publish.

        Returns:
            The number of images that earlier attempts did, and the failed images by cause.
        """
        draft = DraftVersion.of(self.job.root, self.number, self.spec)
        before = Round.latest(draft.location, draft.root).rows
        reducers: list[Reducer] = []
        with timed("embed", self.job.stages):
            until_done(
                lambda: reducers.append(self._add(draft)),
                progress=lambda: Round.latest(draft.location, draft.root).number,
            )
        (reducer,) = reducers
        with timed("calibrate", self.job.stages):
            until_done(lambda: self._publish(reducer), progress=lambda: 0)
        return before, reducer.count_failures.causes

    def _plan(self) -> Plan:
        """A new plan for each attempt of a stage, because nodes come and go."""
        return plan_for(self.job.options)

    def _add(self, draft: DraftVersion) -> Reducer:
        """Add the images that no round holds, and finish all groups.

        Raises:
            TooManyFailed: if images couldn't be fetched, after all others are committed.
        """
        self.job.claim.check()
        plan, options = self._plan(), self.job.options
        reducer = Reducer(
            draft,
            plan.helper,
            group_counts(self.images),
            options.round_images,
            Failures(options, self.images.num_rows),
            self.job.base,
            self._count,
        )
        if reducer.rows:
            log.info("%d of %d images are done already", reducer.rows, self.images.num_rows)
        uris = self.images["uri"]
        again = self.images.filter(pc.is_in(uris, pa.array(reducer.unfetched, uris.type)))
        in_group = pc.equal(again["group"], pa.scalar(reducer.group, TEXT)).fill_null(False)
        left = self.images.slice(reducer.rows)
        if again.num_rows:
            log.info("%d images that couldn't be fetched are tried again", again.num_rows)
        # first those of the unfinished group, which may be too small without them
        self._sum(again.filter(in_group), reducer, plan, again=True)
        self._sum(left, reducer, plan)
        reducer.finish(plan.finish)
        self._sum(again.filter(pc.invert(in_group)), reducer, plan, again=True)
        reducer.finish(plan.finish)
        reducer.finish_base(plan.finish)
        reducer.commit()
        self.metrics.report_progress(reducer.rows, len(reducer.failures))
        if reducer.rows != self.images.num_rows:
            raise RuntimeError(f"{self.images.num_rows} images listed, but {reducer.rows} read")
        reducer.count_failures.check_fetched()
        return reducer

    def _sum(self, images: pa.Table, reducer: Reducer, plan: Plan, *, again: bool = False) -> None:
        """Add images to the reducer: the manifest's next ones, or failed ones `again`."""
        if not images.num_rows:
            return
        reducer.try_again(images["uri"].to_pylist() if again else None)
        keep = np.zeros(len(images), bool) if again else self._keep(images, reducer)
        images = images.append_column("keep", pa.array(keep))
        parts = partial_sums_of(images, self.spec, self.job.root, self.job.options, plan)
        with closing(parts):
            for blocks in parts:
                self.job.claim.check()
                for block in blocks:
                    reducer.add(block)
                self.metrics.report_progress(reducer.rows, len(reducer.failures))

    def _keep(self, images: pa.Table, reducer: Reducer) -> np.ndarray:
        """Which images' embeddings are kept to calibrate their groups, (n,) bool.

        None of a group with images in the base, or of the one that an earlier attempt began: their
        other embeddings are gone.
        """
        job, keep = self.job, np.zeros(images.num_rows, bool)
        groups = group_counts(images)
        kept = job.kept_images(groups, self.spec)
        start = 0
        for group, count in groups.items():
            if group in kept and group != reducer.group:
                keep[start + job.sample.draw(images.slice(start, count))] = True
            start += count
        return keep

    def _count(self, images: int, causes: Mapping[str, int]) -> None:
        self.metrics.count_fitted(images)
        self.metrics.count_failed(causes)

    def _publish(self, reducer: Reducer) -> None:
        """Calibrate the groups that changed, and make the version the current one."""
        job = self.job
        manifest = self._manifest(reducer.failures)
        is_fitted = pc.equal(manifest["status"], "fitted")
        changed = pa.array([g for g in reducer.entries if g not in job.base.copied], pa.string())
        has_changed = pc.is_in(manifest["group"], changed)
        scores = manifest["leave_one_out_score"].to_numpy().astype(np.float32)
        scores[has_changed.to_numpy()] = np.nan
        entries: Mapping[str, GroupEntry] = reducer.entries
        if job.calibrates:
            rows = self._rows_to_calibrate(manifest, has_changed, entries)
            sample = manifest.take(rows).drop_columns(list(OUTCOMES))
            version = ModelVersion(job.root, self.number, self.spec, entries)
            entries, scores[rows] = calibrate(
                sample, version, job.options, self._plan(), reducer.kept
            )
            job.sampled, job.calibrated = len(rows), int(np.isfinite(scores[rows]).sum())
        manifest = without_sources(manifest)
        manifest = manifest.set_column(
            manifest.column_names.index("leave_one_out_score"),
            "leave_one_out_score",
            pa.array(scores, mask=np.isnan(scores)),
        )
        failed = group_counts(manifest.filter(pc.invert(is_fitted)))
        groups = {
            group: replace(entry, failed=failed.get(group, 0))
            for group, entry in (self._unchanged() | dict(entries)).items()
        }
        self._check_counts(groups, manifest.filter(is_fitted))
        job.check_calibration(manifest)
        images = self.images.num_rows - len(reducer.failures)
        publish(job.root, self.number, self.spec, groups, manifest, job.why.format(images))

    def _rows_to_calibrate(
        self, manifest: pa.Table, has_changed: pa.Array, entries: Mapping[str, GroupEntry]
    ) -> np.ndarray:
        """The manifest's rows of images in the sample that were fitted.

        The sample is drawn from the listed images, so it is the same whichever of them fail.
        """
        changed = has_changed.to_numpy().nonzero()[0]
        rows = changed[self.job.sample.draw(manifest.filter(has_changed))]
        chosen = manifest.select(["group", "status"]).take(rows)
        groups, status = chosen["group"].to_pylist(), chosen["status"].to_pylist()
        return rows[
            [
                each == "fitted" and entries[group].images >= MIN_LEFT_OUT_OF
                for group, each in zip(groups, status, strict=True)
            ]
        ]

    def _manifest(self, failures: Mapping[str, str]) -> pa.Table:
        """The version's manifest: all of its images with their outcomes."""
        kept = self.job.kept(self.images)
        if kept is not None and self.job.base.subtract:
            return kept
        images = _with_status(self.images, failures)
        if kept is None:
            return images
        manifest = pa.concat_tables([kept, images], promote_options="default")
        for name, fetched in FETCHED.items():
            if fetched in manifest.column_names:
                sources = pc.coalesce(manifest[fetched], manifest[name])
                index = manifest.column_names.index(fetched)
                manifest = manifest.set_column(index, fetched, sources)
        return sort_images(manifest)

    def _unchanged(self) -> dict[str, GroupEntry]:
        """Entries of the groups that don't change, whose files an earlier version holds."""
        base = self.job.base
        return {
            group: replace(holder.groups[group], version=holder.home(group))
            for group in base.groups
            if group not in base.rewritten and group not in base.copied
            for holder in base.holders(group)
        }

    def _check_counts(self, groups: Mapping[str, GroupEntry], fitted: pa.Table) -> None:
        """Raises: RuntimeError if the moments don't have the manifest's readable images."""
        expected = Counter(group_counts(fitted))
        for version in self.job.base.versions:  # the manifest lacks images fitted as tensors
            expected.update(nameless_images(version))
        counts = {group: entry.images for group, entry in groups.items()}
        if dict(expected) != counts:
            raise RuntimeError(f"the manifest has {dict(expected)} images, the moments {counts}")


def nameless_images(version: ModelVersion) -> dict[str, int]:
    """The number of images per group that were fitted as tensors, without being listed."""
    manifest = with_outcomes(version.load_manifest())
    listed = group_counts(manifest.filter(pc.equal(manifest["status"], "fitted")))
    return {
        group: entry.images - listed.get(group, 0)
        for group, entry in version.groups.items()
        if entry.images > listed.get(group, 0)
    }


def with_outcomes(manifest: pa.Table) -> pa.Table:
    """A version's manifest with all of `OUTCOMES`."""
    for name, kind in OUTCOMES.items():
        if name not in manifest.column_names:  # a model that was fitted to tensors
            manifest = manifest.append_column(name, pa.nulls(manifest.num_rows, kind))
    return manifest


def _with_status(images: pa.Table, failures: Mapping[str, str]) -> pa.Table:
    errors = [failures.get(uri) for uri in images["uri"].to_pylist()]
    status = pa.array(["failed" if error else "fitted" for error in errors], TEXT)
    images = images.append_column("status", status)
    return with_outcomes(images.append_column("error", pa.array(errors, TEXT)))
