"""The fit job: images → partial sums → moments → Gaussians → calibration → a published model."""

import time
from collections.abc import Iterator
from dataclasses import replace
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
from padim_ray.errors import ImageError
from padim_ray.manifest import group_counts
from padim_ray.model import Embedder, as_images, finite_images, state_shards
from padim_ray.moments import Moments, accumulate_, empty_moments
from padim_ray.options import FitOptions, from_mapping
from padim_ray.pipeline.calibrate import calibrate
from padim_ray.pipeline.columns import column_array
from padim_ray.pipeline.memory import return_freed_memory
from padim_ray.pipeline.merge import Reducer, Target, check_count, serialise
from padim_ray.pipeline.resources import Plan, plan_resources
from padim_ray.pipeline.run import check_images_option, decode_images, read_images_table
from padim_ray.pipeline.session import cluster_nodes, data_context, ray_session
from padim_ray.pipeline.summary import Summary, timed
from padim_ray.spec import ModelSpec, new_spec
from padim_ray.storage import Location
from padim_ray.trunk import Precision, native_precision

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
    manifest = read_images_table(options)
    listed = group_counts(manifest)
    for group, count in listed.items():
        check_count(group, count)
    root.check_writable()
    number = (artifact.current_number(root) or 0) + 1
    stages: dict[str, float] = {}
    with ray_session(options.address):
        plan = plan_resources(cluster_nodes(), options.actors)
        spec = replace(spec, precision=_precision(options, plan))
        artifact.save_trunk_weights(root, weights)
        target = Target(root, number, len(state_shards(spec)))
        reducer = Reducer(spec.regularization, target, plan.helper_cpus, listed)
        with timed("embed", stages):
            for bundle in _partial_sums(options, plan, spec, root, manifest):
                for block in bundle.block_refs:
                    reducer.add(block)
        with timed("factorise", stages):
            reducer.finish(plan.finish_cpus)
        allowed = options.allows(len(reducer.failures), manifest.num_rows)
        if allowed:
            version = ModelVersion(root, number, spec, reducer.entries)
            with timed("calibrate", stages):
                _publish(version, _with_status(manifest, reducer.failures), options, plan)
    summary = Summary(
        job="fit",
        listed=manifest.num_rows,
        failures=reducer.failures,
        groups=listed,
        seconds=time.monotonic() - started,
        stages=stages,
        places={"model": f"{root.uri} (version {number})" if allowed else "not published"},
        within_max_failed=allowed,
    )
    summary.report()
    return summary


def _publish(version: ModelVersion, manifest: pa.Table, options: FitOptions, plan: Plan) -> None:
    """Calibrate the version and make it the current one."""
    groups, scores = version.groups, np.full(manifest.num_rows, np.nan, np.float32)
    if options.calibration_images:
        is_fitted = pc.is_null(manifest["error"])
        fitted = manifest.filter(is_fitted).drop_columns(["status", "error"])
        groups, scores[is_fitted.to_numpy()] = calibrate(fitted, version, options, plan)
    column = pa.array(scores, mask=np.isnan(scores))
    manifest = manifest.append_column("leave_one_out_score", column)
    artifact.publish(version.root, version.number, version.spec, groups, manifest)


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
        decoded, shards = decode_images(manifest, spec.preprocessing, options, plan)
        partials = decoded.map_batches(
            PartialSums,
            fn_constructor_args=[root, spec, plan, options.batch_size or plan.batch_size],
            batch_size=images_per_partial(manifest.num_rows, plan.actors, spec),
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
