"""The fit job: images → partial sums → moments → Gaussians → calibration → a published model."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from padim_ray import artifact
from padim_ray.artifact import ModelVersion
from padim_ray.claim import Claim, claimed
from padim_ray.credentials import hidden_credentials
from padim_ray.description import GroupEntry
from padim_ray.failures import Failures, count_causes
from padim_ray.job_record import JOB, JobRecord, describe_changes, identify
from padim_ray.manifest import group_counts
from padim_ray.model import state_shards
from padim_ray.options import FitOptions, from_mapping
from padim_ray.pipeline.calibrate import calibrate
from padim_ray.pipeline.merge import Target
from padim_ray.pipeline.partial_sums import partial_sums
from padim_ray.pipeline.recovery import until_done
from padim_ray.pipeline.reducer import Reducer, check_count
from padim_ray.pipeline.resources import Plan, plan_resources
from padim_ray.pipeline.run import check_images_option, read_images_table
from padim_ray.pipeline.session import cluster_nodes, is_only_node, ray_session
from padim_ray.pipeline.summary import Summary, timed
from padim_ray.rounds import Round, remove_rounds
from padim_ray.sources import without_sources
from padim_ray.spec import ModelSpec, new_spec
from padim_ray.storage import Location
from padim_ray.trunk import Precision, native_precision

log = logging.getLogger("padim_ray")


def fit(**options: Any) -> Summary:
    """Fit a model to good images and publish it.

    Args:
        options: the fields of `FitOptions`, named as on the command line:
            `padim_ray.fit(images="archive/{group}/train/*.png", model="models/line7")`.

    Raises:
        PadimError: for a mistake in the options, or if a group can't be fitted.
    """
    return run_fit(from_mapping(FitOptions, options))


def run_fit(options: FitOptions) -> Summary:
    """Fit as `options` say; see `fit`."""
    with hidden_credentials(options.storage_options):
        return _run(options)


def _run(options: FitOptions) -> Summary:
    started = time.monotonic()
    root = Location.of(options.model, options.storage_options)
    check_images_option(options)
    spec, weights = new_spec(options.model_options, "float32", options.storage_options)
    identity = identify(options, job="fit", weights_sha256=spec.weights_sha256)
    with claimed(root, "fit") as claim:
        number, images = artifact.current_number(root) or 0, None
        fitted = None if options.overwrite else _fitted_alike(root, number, identity)
        if fitted:
            images = read_images_table(options)
            if describe_changes(fitted.images, images) is None:
                log.info("Nothing is left to do: see --overwrite to fit these images once more")
                causes = _published_causes(root)
                return _sum_up(root, number, images, causes, started, before=images.num_rows)
        number += 1
        place = artifact.version_location(root, number)
        if options.overwrite:
            (place / JOB).remove()  # first, so that a kill doesn't leave half of an unfinished fit
            place.remove_all()
        record = JobRecord.read(place)
        if record:
            record = _continue(record, identity, options, root)
            images = record.images
            if artifact.is_published(root, number):  # and killed before it became current
                artifact.make_current(root, number)
                remove_rounds(place)
                causes = _published_causes(root)
                return _sum_up(root, number, images, causes, started, before=images.num_rows)
        images = read_images_table(options) if images is None else images
        for group, count in group_counts(images).items():
            check_count(group, count)
        stages: dict[str, float] = {}
        with ray_session(options.address):
            if record is None:
                place.remove_all()
                plan = plan_resources(cluster_nodes(), options.actors)
                record = JobRecord(identity, {"precision": _precision(options, plan)}, images)
                record.write(place)
            artifact.save_trunk_weights(root, weights)
            del weights  # hundreds of MB, for the whole job
            spec = replace(spec, precision=record.settings["precision"])
            before, causes = _Fit(options, root, number, spec, images, claim, stages).run()
        remove_rounds(place)
        return _sum_up(root, number, images, causes, started, before, stages)


def _fitted_alike(root: Location, number: int, identity: Mapping[str, Any]) -> JobRecord | None:
    """What a published version was fitted to, if with the same options."""
    record = JobRecord.read(artifact.version_location(root, number)) if number else None
    return record if record and dict(record.identity) == dict(identity) else None


def _continue(
    record: JobRecord, identity: Mapping[str, Any], options: FitOptions, root: Location
) -> JobRecord:
    """The unfinished fit, if it is the one that is asked for.

    It is continued with its images as they were listed: in an archive that grows, the same command
    would never finish otherwise.
    """
    place = f"{root.uri} holds an unfinished fit"
    record.check_identity(identity, place)
    if options.manifest is not None:
        return record.with_images(read_images_table(options), place)
    log.info("Continuing with the %d images that were listed", record.images.num_rows)
    return record


def _published_causes(root: Location) -> dict[str, int]:
    return count_causes(artifact.open_version(root).load_manifest()["error"].to_pylist())


def _sum_up(
    root: Location,
    number: int,
    images: pa.Table,
    causes: Mapping[str, int],
    started: float,
    before: int,
    stages: Mapping[str, float] | None = None,
) -> Summary:
    summary = Summary(
        job="fit",
        listed=images.num_rows,
        failed_by_cause=dict(Counter(causes).most_common()),
        groups=group_counts(images),
        before=before,
        seconds=time.monotonic() - started,
        stages=stages or {},
        places={"model": f"{root.uri} (version {number})"},
    )
    summary.report()
    return summary


@dataclass(frozen=True)
class _Fit:
    """A fit with what it was begun with; `run` does what is left of it, and publishes."""

    options: FitOptions
    root: Location
    number: int
    spec: ModelSpec
    manifest: pa.Table
    claim: Claim
    stages: dict[str, float]

    def run(self) -> tuple[int, Mapping[str, int]]:
        """Fit and publish: images that an earlier attempt had done, failed images by cause."""
        target = Target(self.root, self.number, len(state_shards(self.spec)))
        before = Round.latest(target.location).rows
        reducers: list[Reducer] = []
        with timed("embed", self.stages):
            until_done(
                lambda: reducers.append(self._sum(target)),
                progress=lambda: Round.latest(target.location).rows,
            )
        (reducer,) = reducers
        with timed("calibrate", self.stages):
            until_done(lambda: self._publish(reducer), progress=lambda: 0)
        return before, reducer.count_failures.causes

    def _plan(self) -> Plan:
        """Anew each time: nodes come and go."""
        return plan_resources(cluster_nodes(), self.options.actors)

    def _sum(self, target: Target) -> Reducer:
        """Sum up the images that no round holds yet, and finish all groups."""
        plan = self._plan()
        reducer = Reducer(
            self.spec.regularization,
            target,
            plan.helper_cpus,
            group_counts(self.manifest),
            self.options.round_images,
            Failures(self.options, self.manifest.num_rows),
        )
        if reducer.rows:
            log.info("%d of %d images are done already", reducer.rows, self.manifest.num_rows)
        left = self.manifest.slice(reducer.rows)
        if left.num_rows:
            with closing(partial_sums(self.options, plan, self.spec, self.root, left)) as bundles:
                for bundle in bundles:
                    for block in bundle.block_refs:
                        reducer.add(block)
        reducer.finish(plan.finish_cpus)
        reducer.commit()
        if reducer.rows != self.manifest.num_rows:
            raise RuntimeError(f"{self.manifest.num_rows} images listed, but {reducer.rows} read")
        return reducer

    def _publish(self, reducer: Reducer) -> None:
        """Calibrate the version and make it the current one."""
        groups: Mapping[str, GroupEntry] = reducer.entries
        manifest = _with_status(without_sources(self.manifest), reducer.failures)
        scores = np.full(manifest.num_rows, np.nan, np.float32)
        if self.options.calibration_images:
            version = ModelVersion(self.root, self.number, self.spec, groups)
            is_fitted = pc.is_null(manifest["error"])
            fitted = self.manifest.filter(is_fitted)
            groups, scores[is_fitted.to_numpy()] = calibrate(
                fitted, version, self.options, self._plan()
            )
        column = pa.array(scores, mask=np.isnan(scores))
        manifest = manifest.append_column("leave_one_out_score", column)
        _check_published_counts(groups, manifest)
        self.claim.check()
        artifact.publish(self.root, self.number, self.spec, groups, manifest)


def _check_published_counts(groups: Mapping[str, GroupEntry], manifest: pa.Table) -> None:
    """Raises: RuntimeError if the moments are not of the manifest's readable images."""
    readable = group_counts(manifest.filter(pc.equal(manifest["status"], "fitted")))
    counts = {group: entry.images for group, entry in groups.items()}
    if readable != counts:
        raise RuntimeError(f"the manifest has {readable} readable images, the moments {counts}")


def _precision(options: FitOptions, plan: Plan) -> Precision:
    """What `auto` means, asked on a worker like those that will compute."""
    if options.precision != "auto":
        return options.precision
    if plan.device == "cpu" and is_only_node():
        return native_precision()  # a worker would first import PyTorch, for seconds
    probe = ray.remote(native_precision).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)
    return ray.get(probe.remote(plan.device))


def _with_status(manifest: pa.Table, failures: dict[str, str]) -> pa.Table:
    errors = [failures.get(uri) for uri in manifest["uri"].to_pylist()]
    status = pa.array(["failed" if error else "fitted" for error in errors])
    return manifest.append_column("status", status).append_column(
        "error", pa.array(errors, pa.string())
    )
