"""What update, forget and convert share: jobs that start from one version of a model."""

from dataclasses import dataclass, fields
from functools import cached_property

import pyarrow as pa

from padim_ray.model.layout import version_location
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.jobs.calibrate import Sample
from padim_ray.pipeline.jobs.make_version import with_outcomes
from padim_ray.pipeline.jobs.new_version import Job
from padim_ray.runs.job_record import JOB, read_identity
from padim_ray.runs.options.fit import FitOptions
from padim_ray.storage.json_fields import whole


@dataclass(kw_only=True)
class JobOnVersion(Job):
    """A job whose base is one version."""

    @property
    def version(self) -> ModelVersion:
        """The version that the job starts from."""
        (version,) = self.base.versions
        return version

    @cached_property
    def manifest(self) -> pa.Table:
        """That version's manifest."""
        return with_outcomes(self.version.load_manifest())


def sample_of(version: ModelVersion) -> Sample:
    """The choice of images that the version was calibrated with; later versions keep it.

    Raises:
        ModelError: if the version's job record is invalid.
    """
    place = version_location(version.root, version.number)
    chosen = read_identity(place, version.root) or {}
    names = [field.name for field in fields(Sample)]
    values = {name: chosen.get(name, getattr(FitOptions, name)) for name in names}
    for name, value in values.items():
        whole(-(2**63), 2**63)(value, f"{place.uri}/{JOB}: identity.{name}")
    return Sample(**values)
