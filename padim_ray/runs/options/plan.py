"""Options of `plan`."""

import math
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import (
    GPUS,
    IMAGES,
    RUN,
    LimitOptions,
    SourceOptions,
    StorageOptions,
    check_number,
    check_positive,
    flag_name,
)
from padim_ray.runs.options.fit import CalibrationOptions, ProgressOptions
from padim_ray.runs.options.model import FeatureOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOptions(ProgressOptions, CalibrationOptions, FeatureOptions, LimitOptions, SourceOptions):
    """Options of `plan`: the images, the features, and the cluster to plan for."""

    model: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Directory of a fitted model. Its settings replace those below."""

    sample: Annotated[int, Parameter(group=IMAGES)] = 16
    """Images to fetch and decode here, to measure how long that takes. 0: none."""

    gpus: Annotated[int, GPUS] = 0

    cpus: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """CPU cores of the cluster. Default: as many as this machine has."""

    gpu_memory: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """Memory of each GPU, in GiB. Default: that of a GPU in this machine, or else 16."""

    rate: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """Images/s that one actor (a GPU, or 8 cores) fits or scores. Default: measured here, if this
    machine has such a device."""

    storage_options: StorageOptions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("cpus", self.cpus)
        for name in ("gpus", "sample"):
            check_number(name, getattr(self, name))
        for name in ("rate", "gpu_memory"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PadimError(f"{flag_name(name)} must be above 0, but is {value}")
        if self.model is not None:
            defaults = FeatureOptions()
            for field in fields(FeatureOptions):
                if getattr(self, field.name) != getattr(defaults, field.name):
                    raise PadimError(f"{flag_name(field.name)} is the model's: leave it out")
