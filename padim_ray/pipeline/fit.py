"""The fit job: images → partial sums → moments → Gaussians → calibration → a published model."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.data._internal.execution.interfaces import RefBundle

from padim_ray import artifact
from padim_ray.artifact import ModelVersion
from padim_ray.claim import Claim, claimed
from padim_ray.credentials import hidden_credentials
from padim_ray.description import GroupEntry
from padim_ray.errors import ImageError
from padim_ray.failures import Failures, count_causes
from padim_ray.job_record import JOB, JobRecord, describe_changes, identify
from padim_ray.manifest import group_counts, shard_rows, shard_table
from padim_ray.model import Embedder, as_images, finite_images, state_shards
from padim_ray.moments import Moments, accumulate_, empty_moments
from padim_ray.options import FitOptions, from_mapping
from padim_ray.pipeline.calibrate import calibrate
from padim_ray.pipeline.columns import column_array
from padim_ray.pipeline.decode import images_per_shard
from padim_ray.pipeline.memory import return_freed_memory
from padim_ray.pipeline.merge import Target, serialise
from padim_ray.pipeline.recovery import until_done
from padim_ray.pipeline.reducer import Reducer, check_count
from padim_ray.pipeline.resources import Plan, plan_resources
from padim_ray.pipeline.run import check_images_option, decode_images, read_images_table
from padim_ray.pipeline.session import cluster_nodes, data_context, ray_session
from padim_ray.pipeline.summary import Summary, timed
from padim_ray.rounds import Round, remove_rounds
from padim_ray.sources import without_sources
from padim_ray.spec import ModelSpec, new_spec
from padim_ray.storage import Location
from padim_ray.trunk import Precision, native_precision

log = logging.getLogger("padim_ray")

MIN_PARTIAL_IMAGES = 512
MAX_PARTIAL_BYTES = 2**30  # of the decoded images that one partial sum is made of
ACCUMULATED_TOGETHER = 128  # images: enough for the state's memory traffic not to dominate


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
    started = time.monotonic()
    root = Location.of(options.model, options.storage_options)
    check_images_option(options)
    spec, weights = new_spec(options.model_options, "float32", options.storage_options)
    identity = identify(options, job="fit", weights_sha256=spec.weights_sha256)
    with hidden_credentials(options.storage_options), claimed(root, "fit") as claim:
        number = artifact.current_number(root) or 0
        if number and not options.overwrite and _is_same(root, number, identity, options):
            log.info("Nothing is left to do: see --overwrite to fit these images once more")
            return _sum_up(root, number, started)
        number += 1
        place = artifact.version_location(root, number)
        if options.overwrite:
            (place / JOB).remove()  # first, so that a kill doesn't leave half of an unfinished fit
            place.remove_all()
        record = JobRecord.read(place)
        if record:
            record = _continue(record, identity, options, root)
            if artifact.is_published(root, number):  # and killed before it became current
                return _finish(root, number, started)
        images = record.images if record else read_images_table(options)
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
            spec = replace(spec, precision=record.settings["precision"])
            _Fit(options, root, number, spec, images, claim, stages).run()
        return _finish(root, number, started, stages)


def _is_same(root: Location, number: int, identity: Mapping[str, Any], options: FitOptions) -> bool:
    """Whether a published version was fitted to the same images with the same options."""
    record = JobRecord.read(artifact.version_location(root, number))
    if record is None or dict(record.identity) != dict(identity):
        return False
    return describe_changes(record.images, read_images_table(options)) is None


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


def _finish(
    root: Location, number: int, started: float, stages: Mapping[str, float] | None = None
) -> Summary:
    artifact.make_current(root, number)
    remove_rounds(artifact.version_location(root, number))
    return _sum_up(root, number, started, stages)


def _sum_up(
    root: Location, number: int, started: float, stages: Mapping[str, float] | None = None
) -> Summary:
    manifest = artifact.open_version(root).load_manifest()
    summary = Summary(
        job="fit",
        listed=manifest.num_rows,
        failed_by_cause=count_causes(manifest["error"].to_pylist()),
        groups=group_counts(manifest),
        before=0 if stages else manifest.num_rows,
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

    def run(self) -> None:
        target = Target(self.root, self.number, len(state_shards(self.spec)))
        reducers: list[Reducer] = []
        with timed("embed", self.stages):
            until_done(
                lambda: reducers.append(self._sum(target)),
                progress=lambda: Round.latest(target.location).rows,
            )
        (reducer,) = reducers
        with timed("calibrate", self.stages):
            until_done(lambda: self._publish(reducer), progress=lambda: 0)

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
            for bundle in _partial_sums(self.options, plan, self.spec, self.root, left):
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
    probe = ray.remote(native_precision).options(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)
    return ray.get(probe.remote(plan.device))


def _partial_sums(
    options: FitOptions, plan: Plan, spec: ModelSpec, root: Location, manifest: pa.Table
) -> Iterator[RefBundle]:
    """Blocks of partial sums, group after group.

    In the manifest's order they are of the same images in every run: results repeat.
    """
    with data_context(preserve_order=True):
        per_shard = images_per_shard(manifest.num_rows, spec.preprocessing)
        shards = [
            shard_table(manifest, *shard) for shard in enumerate(shard_rows(manifest, per_shard))
        ]
        partials = decode_images(shards, spec.preprocessing, options, plan).map_batches(
            PartialSums,
            fn_constructor_args=[root, spec, plan, options.batch_size or plan.batch_size],
            batch_size=min(
                images_per_partial(manifest.num_rows, plan.actors, spec), options.round_images
            ),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=min(plan.actors, len(shards)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
        )
        yield from partials.iter_internal_ref_bundles()


def images_per_partial(images: int, actors: int, spec: ModelSpec) -> int:
    """How many images one partial sum is made of.

    So many that the sums don't weigh more than the images themselves, but no fewer than 512 nor
    more than a GiB of them; and on small sets as few as share the work among the actors.
    """
    height, width = spec.preprocessing.size
    image_bytes = 3 * height * width
    weighty = 4 * spec.grid.state_size // image_bytes
    most = max(1, MAX_PARTIAL_BYTES // image_bytes)
    return min(max(weighty, MIN_PARTIAL_IMAGES), most, -(-images // actors))


class PartialSums:
    """Images in, partial sums out. Keeps nothing between calls: Ray may run any call twice.

    Rows out: `group`, `shard` (which run of cells), `count`, `state` (moments, float32, serialised)
    and `failures` (uri and error of images that failed; in shard 0's row only).
    """

    def __init__(self, root: Location, spec: ModelSpec, plan: Plan, batch_size: int) -> None:
        torch.set_num_threads(plan.threads)
        return_freed_memory()
        self.embedder = Embedder(
            spec, artifact.load_trunk_weights(root, spec.weights_sha256), plan.device
        )
        self.batch_size = batch_size

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        start = 0
        for _, run in groupby(images["group"].to_pylist()):
            length = len(list(run))
            yield from self._sum(images.slice(start, length))
            start += length

    def _sum(self, images: pa.Table) -> Iterator[pa.Table]:
        spec = self.embedder.spec
        pairs = zip(images["uri"].to_pylist(), images["error"].to_pylist(), strict=True)
        failures = {uri: error for uri, error in pairs if error}
        total = empty_moments(spec.grid.cells, spec.grid.channels, device=self.embedder.device)
        step = max(ACCUMULATED_TOGETHER, self.batch_size)
        for start in range(0, images.num_rows, step):
            # a filter copies, so not before the slice: memory is bounded by the step
            part = images.slice(start, step)
            part = part.filter(pc.is_null(part["error"]))
            if part.num_rows:
                total = self._accumulate(total, part, failures)
        group = images["group"][0].as_py()
        if not total.count:
            yield _row(group, 0, 0, b"", failures)
            return
        for shard, (start, stop) in enumerate(state_shards(spec)):
            state = serialise(total.cells(start, stop).to("cpu"))
            yield _row(group, shard, total.count, state, failures if shard == 0 else {})

    def _accumulate(self, total: Moments, images: pa.Table, failures: dict[str, str]) -> Moments:
        pixels = column_array(images["image"], np.uint8, (*self.embedder.spec.mapper.size, 3))
        patches = self.embedder.embed(as_images(pixels), self.batch_size)
        good = finite_images(patches)
        if not good.all():
            error = str(ImageError("embed", "NaN or infinite features"))
            bad = (~good).nonzero().flatten().tolist()
            failures.update({images["uri"][row].as_py(): error for row in bad})
            patches = [level[..., good] for level in patches]
        return accumulate_(total, patches) if good.any() else total


def _row(group: str, shard: int, count: int, state: bytes, failures: dict[str, str]) -> pa.Table:
    return pa.table(
        {
            "group": pa.array([group], pa.string()),
            "shard": pa.array([shard], pa.int32()),
            "count": pa.array([count], pa.int64()),
            "failures": pa.array([list(failures.items())], pa.map_(pa.string(), pa.string())),
            "state": pa.array([state], pa.large_binary()),
        }
    )


def _with_status(manifest: pa.Table, failures: dict[str, str]) -> pa.Table:
    errors = [failures.get(uri) for uri in manifest["uri"].to_pylist()]
    status = pa.array(["failed" if error else "fitted" for error in errors])
    return manifest.append_column("status", status).append_column(
        "error", pa.array(errors, pa.string())
    )
