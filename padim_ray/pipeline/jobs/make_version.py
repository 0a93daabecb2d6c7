"""Make a version of a model: add images up, calibrate the groups that changed, publish.

Images' statistics accumulate round after round, and are added to those of the base versions or
subtracted from them. `new_version` has the jobs that ask for it.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.densities import MIN_LEFT_OUT_OF
from padim_ray.images.manifest import TEXT, group_counts, sort_images
from padim_ray.images.sources import FETCHED, without_sources
from padim_ray.model.draft import DraftVersion
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import publish
from padim_ray.model.rounds import Round
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import OUTCOMES, ModelVersion
from padim_ray.pipeline.cluster.nodes import plan_for
from padim_ray.pipeline.cluster.prometheus import JobMetrics
from padim_ray.pipeline.cluster.recovery import until_done
from padim_ray.pipeline.graphs import partial_sums_of
from padim_ray.pipeline.jobs.calibrate import calibrate
from padim_ray.pipeline.merging.reducer import Reducer
from padim_ray.planning.resources import Plan
from padim_ray.runs.failures import Failures
from padim_ray.runs.summary import timed

if TYPE_CHECKING:
    from padim_ray.pipeline.jobs.new_version import Job

log = logging.getLogger("padim_ray")


@dataclass(frozen=True)
class VersionMaker:
    """A version that is being made; `make` does what is left to do, and publishes it.

    Attributes:
        job: the job that makes it.
        number: the version's number.
        spec: the version's spec.
        images: the images to add or subtract.
        metrics: the job's metrics.
    """

    job: "Job"
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
        kept = job.embeddings_to_keep(groups, self.spec)
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
