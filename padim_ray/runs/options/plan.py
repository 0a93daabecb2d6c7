"""Options of `plan`."""

import math
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.images.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from padim_ray.runs.options.common import IMAGES, MODEL, RUN, StorageOptions, check_number, flag
from padim_ray.runs.options.model import FeatureOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOptions(FeatureOptions):
    """Options of `plan`."""

    images: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Images to read, such as 's3://archive/{group}/train/good/*.png'; as for the jobs."""

    manifest: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Parquet file that lists the images instead; only the columns that matter are read."""

    model: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Directory of a fitted model, whose settings count instead of those below."""

    max_image_pixels: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_PIXELS
    """Images of more pixels fail, before they are decoded."""

    max_image_bytes: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_BYTES
    """Larger files fail, before they are read."""

    sample: Annotated[int, Parameter(group=IMAGES)] = 16
    """Images that are fetched and decoded here, to measure. 0: none."""

    calibration_images: Annotated[int, Parameter(group=MODEL)] = 2000
    """Training images per group, at most, that a fit reads once more."""

    gpus: Annotated[int, Parameter(group=RUN)] = 0
    """GPUs of the cluster. 0: it has CPUs only."""

    cpus: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """CPU cores of the cluster. Default: as many as this machine has."""

    gpu_memory: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """GiB of each GPU. Default: what a GPU here has, else 16."""

    rate: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """Images/s that one actor (a GPU, or 8 cores) sums up or scores. Default: measured here, where
    there is such a device."""

    round_images: Annotated[int, Parameter(group=RUN)] = 20_000
    """As of the fit that is planned."""

    storage_options: StorageOptions = None
    """JSON for fsspec, such as '{"endpoint_url": "http://minio:9000"}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.manifest is None):
            raise PadimError("Say which images to read: either --images or --manifest")
        for name in ("cpus", "max_image_pixels", "max_image_bytes", "round_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PadimError(f"{flag(name)} must be at least 1, but is {value}")
        for name in ("gpus", "sample", "calibration_images"):
            check_number(name, getattr(self, name))
        for name in ("rate", "gpu_memory"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PadimError(f"{flag(name)} must be above 0, but is {value}")
        if self.model is not None:
            defaults = FeatureOptions()
            for field in fields(FeatureOptions):
                if getattr(self, field.name) != getattr(defaults, field.name):
                    raise PadimError(f"{flag(field.name)} is the model's: leave it out")
