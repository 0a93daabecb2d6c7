"""Options of `fit`, `update` and `forget`."""

import re
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import MODEL, RUN, JobOptions, RunOptions, check_number
from padim_ray.runs.options.model import ModelOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RoundOptions(RunOptions):
    """Options of the jobs that make a new version of a model."""

    round_images: Annotated[int, Parameter(group=RUN)] = 20_000
    """Images after which progress is committed: at most so many are read again if the job is
    killed. Each time costs writing one group's moments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_images < 1:
            raise PadimError(f"--round-images must be at least 1, but is {self.round_images}")
        model = getattr(self, "model", "")
        if found := re.search("@[0-9]{1,9}$", model):
            raise PadimError(
                f"--model {model} names a version, and versions never change: leave {found[0]} out"
            )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VersionOptions(RoundOptions, JobOptions):
    """Options of the jobs that make a new version of images."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FitOptions(ModelOptions, VersionOptions):
    """Options of `fit`."""

    calibration_images: Annotated[int, Parameter(group=MODEL)] = 2000
    """Training images per group, at most, whose leave-one-out scores thresholds and p-values are
    made from; chosen by --seed. 0: none, and no thresholds."""

    def __post_init__(self) -> None:
        VersionOptions.__post_init__(self)
        ModelOptions.__post_init__(self)
        check_number("calibration_images", self.calibration_images)

    @property
    def model_options(self) -> ModelOptions:
        return ModelOptions(
            **{field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        )
