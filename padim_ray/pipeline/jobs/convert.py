"""Convert: another density fitted to a model's statistics, without its images."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from padim_ray.densities import convert_density
from padim_ray.model.layout import split_name
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import OUTCOMES, open_version
from padim_ray.pipeline.jobs.on_version import JobOnVersion, sample_of
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.runs.job_record import identify
from padim_ray.runs.options.common import check_no_credentials, from_mapping
from padim_ray.runs.options.convert import ConvertOptions
from padim_ray.runs.summary import Summary
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


def convert(model: str, **options: Any) -> Summary:
    """Fit another kind of density to a model's statistics, and publish it as the next version.

    The result equals the model that is fitted with that density to the same images. No image is
    read, unless the new version is to be calibrated.

    Args:
        model: such as "s3://models/line7"; or, to convert a version that isn't the current one,
            "s3://models/line7@3".
        options: the fields of `ConvertOptions`, named as on the command line.

    Raises:
        PadimError: if the model's statistics aren't those that the density is fitted to.
    """
    return run_convert(model, from_mapping(ConvertOptions, options))


def run_convert(model: str, options: ConvertOptions) -> Summary:
    """Convert as `options` say; see `convert`."""
    check_no_credentials("The model's name", model)
    with hidden_credentials(options.storage_options):
        uri, number = split_name(model)
        root = Location.of(uri, options.storage_options)
        with claimed(root, "convert") as claim:
            root = claim.root
            version = open_version(root, number)
            sample = sample_of(version)
            return _Convert(
                name="convert",
                options=options,
                root=root,
                claim=claim,
                sample=sample,
                identity=identify(
                    options,
                    job="convert",
                    model_version=version.number,
                    model_sha256=version.fingerprint(),
                    **asdict(sample),
                ),
                why=f"version {version.number} converted to density {options.density}",
                base=BaseVersions(
                    (version,), subtract=True, rewritten=tuple(sorted(version.groups))
                ),
                calibrates=options.calibrate == "readable",
                spec=replace(
                    version.spec, density=convert_density(version.spec.density, options.density)
                ),
            ).run()


@dataclass(kw_only=True)
class _Convert(JobOnVersion):
    spec: ModelSpec

    def list_images(self) -> pa.Table:
        """No image is added or subtracted."""
        return self.manifest.slice(0, 0).drop_columns(list(OUTCOMES))

    def is_done(self, images: pa.Table) -> bool:
        return self.version.spec == self.spec

    def prepare(self, settings: Mapping[str, Any]) -> ModelSpec:
        return self.spec

    def kept(self, images: pa.Table) -> pa.Table:
        return self.manifest

    def check_calibration(self, manifest: pa.Table) -> None:
        if not self.calibrates:
            log.warning(
                "The new version has no thresholds and no p-values: convert with --calibrate "
                "readable, update the model, or score with --threshold"
            )
