"""The job that fit, update, forget and merge share: it makes a new version, or continues one."""

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import PadimError
from padim_ray.images.manifest import group_counts
from padim_ray.model.layout import (
    check_number,
    current_number,
    is_published,
    next_number,
    version_location,
    version_numbers,
)
from padim_ray.model.publish import make_current, remove_manifests
from padim_ray.model.rounds import Round, remove_rounds
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import open_version
from padim_ray.pipeline.cluster.nodes import plan_for
from padim_ray.pipeline.cluster.prometheus import JobMetrics
from padim_ray.pipeline.cluster.session import ray_session
from padim_ray.pipeline.cluster.spilling import spilling
from padim_ray.pipeline.jobs.calibrate import Sample
from padim_ray.pipeline.jobs.make_version import VersionMaker, with_outcomes
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.planning.batches import embedding_bytes, kept_groups
from padim_ray.planning.forecast import State, fit_objects_at_once
from padim_ray.planning.resources import Plan
from padim_ray.runs.failures import count_causes
from padim_ray.runs.job_record import JOB, JobRecord
from padim_ray.runs.options.common import ImagesOptions
from padim_ray.runs.options.fit import RoundOptions
from padim_ray.runs.pushgateway import push_outcome
from padim_ray.runs.summary import Summary
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
                before, causes = VersionMaker(self, number, spec, images, metrics).make()
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
        kept = sum(self.embeddings_to_keep(group_counts(images), spec).values()) * embedding_bytes(
            spec
        )
        added = fit_objects_at_once(
            group_counts(images), images.nbytes, spec, plan, self.options.round_images, kept
        )
        return added + (State.of(spec).merged if self.base.versions else 0)

    def embeddings_to_keep(self, groups: Mapping[str, int], spec: ModelSpec) -> dict[str, int]:
        """How many images' embeddings are kept to calibrate their groups, by group."""
        most = self.sample.calibration_images
        if not (self.calibrates and most):
            return {}
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
