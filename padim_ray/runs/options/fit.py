"""Options of `fit`, `update` and `forget`."""

import re
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import (
    EMBEDDING_MEMORY,
    MODEL,
    RUN,
    JobOptions,
    Options,
    RunOptions,
    check_number,
    check_positive,
)
from padim_ray.runs.options.model import ModelOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProgressOptions(Options):
    """How often progress is committed."""

    round_images: Annotated[int, Parameter(group=RUN)] = 20_000
    """Commit progress after this many images; a job that is killed reads at most this many again.
    Each commit writes one group's moments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("round_images", self.round_images)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """How many images calibrate a model."""

    calibration_images: Annotated[int, Parameter(group=MODEL)] = 2000
    """Maximum number of training images per group to calibrate with, drawn by --seed. Thresholds
    and p-values follow from their leave-one-out scores. 0: no thresholds."""

    embedding_memory: Annotated[int, Parameter(group=RUN)] = EMBEDDING_MEMORY
    """Bytes of Ray's object store in which embeddings of images to calibrate with may be kept. The
    images of groups that don't fit are read once more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("calibration_images", self.calibration_images)
        check_number("embedding_memory", self.embedding_memory)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RoundOptions(ProgressOptions, RunOptions):
    """Options of the jobs that make a new version of a model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model = getattr(self, "model", "")
        if found := re.search("@[0-9]{1,9}$", model):
            raise PadimError(
                f"--model {model} names a version, and versions never change: leave {found[0]} out"
            )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VersionOptions(RoundOptions, JobOptions):
    """Options of the jobs that make a new version from images."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FitOptions(CalibrationOptions, ModelOptions, VersionOptions):
    """Options of `fit`."""

    @property
    def model_options(self) -> ModelOptions:
        return ModelOptions(
            **{field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        )
