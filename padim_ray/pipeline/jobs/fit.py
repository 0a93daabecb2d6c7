"""The fit job: good images in, a published model out."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from padim_ray.features.trunk import native_precision
from padim_ray.features.weights import StateDict
from padim_ray.images.manifest import group_counts
from padim_ray.model.publish import save_trunk_weights
from padim_ray.model.spec import ModelSpec, new_spec
from padim_ray.pipeline.cluster.device import Device
from padim_ray.pipeline.cluster.nodes import is_only_node
from padim_ray.pipeline.jobs.calibrate import Sample
from padim_ray.pipeline.jobs.new_version import Job
from padim_ray.pipeline.merging.reducer import check_count
from padim_ray.planning.resources import Plan
from padim_ray.runs.job_record import JobRecord, describe_changes, identify
from padim_ray.runs.listing import check_images_option, read_images_table
from padim_ray.runs.options.common import from_mapping
from padim_ray.runs.options.fit import FitOptions
from padim_ray.runs.summary import Summary
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


def fit(**options: Any) -> Summary:
    """Fit a model to good images and publish it.

    Args:
        options: the fields of `FitOptions`, named as on the command line:
            `padim_ray.fit(images="archive/{group}/train/*.png", model="models/line7")`.

    Raises:
        PadimError: for a mistake in the options, too many failed images, or a group that can't be
            fitted.
    """
    return run_fit(from_mapping(FitOptions, options))


def run_fit(options: FitOptions) -> Summary:
    """Fit as `options` say; see `fit`."""
    with hidden_credentials(options.storage_options):
        root = Location.of(options.model, options.storage_options)
        check_images_option(options)
        spec, weights = new_spec(options.model_options, "float32", options.storage_options)
        identity = identify(options, job="fit", weights_sha256=spec.weights_sha256)
        with claimed(root, "fit") as claim:
            return _Fit(
                name="fit",
                options=options,
                root=claim.root,
                claim=claim,
                sample=Sample(options.calibration_images, options.seed),
                embedding_memory=options.embedding_memory,
                identity=identity,
                why="fitted to {} images",
                spec=spec,
                weights=weights,
            ).run()


@dataclass(kw_only=True)
class _Fit(Job):
    """A fit.

    Attributes:
        spec: of the new model; its precision is chosen when the job begins.
        weights: of the trunk; None after they are stored.
    """

    options: FitOptions
    spec: ModelSpec
    weights: StateDict | None

    def repeated_images(self, record: JobRecord) -> pa.Table | None:
        images = read_images_table(self.options)
        return images if describe_changes(record.images, images) is None else None

    def list_images(self) -> pa.Table:
        images = read_images_table(self.options)
        for group, count in group_counts(images).items():
            check_count(group, count)
        return images

    def settings(self, plan: Plan) -> dict[str, Any]:
        return {"precision": self._precision(plan)}

    def prepare(self, settings: Mapping[str, Any]) -> ModelSpec:
        if self.weights:
            save_trunk_weights(self.root, self.weights)
            self.weights = None  # frees up to hundreds of MB
        return replace(self.spec, precision=settings["precision"])

    def _precision(self, plan: Plan) -> str:
        """Resolve `auto` on a worker like those that will compute."""
        if self.options.precision != "auto":
            return self.options.precision
        if plan.device == "cpu" and is_only_node():
            return native_precision()  # a worker would take seconds to import PyTorch
        return ray.get(_find_precision.options(**plan.actor.options).remote(plan))


@ray.remote(max_retries=-1)
def _find_precision(plan: Plan) -> str:
    device = Device.of(plan)
    device.check()
    return native_precision(device.name)
