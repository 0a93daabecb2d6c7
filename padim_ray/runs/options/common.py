"""Every option of the jobs, typed: one place behind the command line, YAML files and Python."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import Group, Parameter

from padim_ray.errors import PadimError
from padim_ray.images.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from padim_ray.redaction import redact

IMAGES = Group("Images", sort_key=1)
MODEL = Group("Model", sort_key=2)
RESULTS = Group("Results", sort_key=3)
RUN = Group("Run", sort_key=4)
GROUP_MEMORY = 2 * 2**30


def _parse_json(_: type, tokens: Sequence[Any]) -> dict[str, Any]:
    try:
        value = json.loads(tokens[0].value)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError('must be a JSON object, such as {"anon": true}')
    return value


StorageOptions = Annotated[
    dict[str, Any] | None,
    Parameter(group=RUN, converter=_parse_json, accepts_keys=False, n_tokens=1, show_default=False),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job runs, whatever it does."""

    max_image_pixels: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_PIXELS
    """Images of more pixels fail, before they are decoded."""

    max_image_bytes: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_BYTES
    """Larger files fail, before they are read."""

    group_memory: Annotated[int, Parameter(group=RUN)] = GROUP_MEMORY
    """Bytes of groups' Gaussians that an actor keeps on its device when it scores, those used last;
    what the next group needs is loaded ahead if there is room for it. One group's are always kept.
    """

    batch_size: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """Images per pass through the trunk. Default: 8 on CPUs, 256 on GPUs."""

    actors: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """Workers that hold the trunk. Default: one per GPU; without GPUs, one per 8 cores; more when
    nodes join."""

    gpus: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """GPUs to compute on, at most. The job waits for the first one, and asks an autoscaler for as
    many as its images are worth. 0: compute on CPUs. Default: those that the cluster has."""

    decode_resource: Annotated[str | None, Parameter(group=RUN, negative_none="")] = None
    """Ray resource of the nodes that decode, merge, draw and write, such as padim_decode: other
    nodes, such as those with GPUs, then hold nothing but workers with the trunk."""

    max_failed: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """Stop with exit code 3 as soon as more images fail: a number of images, or a share of those
    listed if below 1. Default: any number may fail, and it is said; but not all of the first 1,000
    to be fetched."""

    overwrite: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """Start afresh, instead of continuing what was begun: replaces a run's results; of a model,
    fits a new version."""

    storage_options: StorageOptions = None
    """JSON for fsspec, such as '{"endpoint_url": "http://minio:9000"}'."""

    address: Annotated[str | None, Parameter(group=RUN, negative_none="")] = None
    """Ray cluster to run on ('auto': the one on this machine). Default: RAY_ADDRESS, which a
    submitted job has; else Ray starts inside this process."""

    def __post_init__(self) -> None:
        check_choices(self)
        sizes = ("max_image_pixels", "max_image_bytes", "group_memory")
        for name in ("batch_size", "actors", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PadimError(f"{flag(name)} must be at least 1, but is {value}")
        if self.gpus is not None and self.gpus < 0:
            raise PadimError(f"--gpus must be at least 0, but is {self.gpus}")
        for name in ("images", "manifest", "model", "out", "decode_resource"):
            if getattr(self, name, None) == "":
                raise PadimError(f"{flag(name)} is empty")
        for name in ("images", "masks", "model", "out"):
            value = getattr(self, name, None)
            if value is not None:
                check_no_credentials(flag(name), value)
        if self.max_failed is not None:
            check_number("max_failed", self.max_failed)

    def allows(self, failed: int, listed: int) -> bool:
        """Whether so many failed images are within --max-failed."""
        if self.max_failed is None:
            return True
        # a quotient is rounded to the same number as the share that was typed; a product is not
        return (failed / listed if self.max_failed < 1 else failed) <= self.max_failed


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ImagesOptions(RunOptions):
    """Which images a job reads."""

    images: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Images to read, such as 's3://archive/{group}/train/good/*.png'. {name} captures a path
    segment or part of one as a column, and {group} chooses the model; *, ? and ** as in a shell."""

    manifest: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Parquet file that lists the images instead: uri, and optionally group and other columns."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.manifest is None):
            raise PadimError("Say which images to read: either --images or --manifest")
        super().__post_init__()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobOptions(ImagesOptions):
    """What every job needs to know that reads images for a model."""

    model: Annotated[str, Parameter(group=IMAGES)]
    """Directory of the model: a path, or a URI such as s3://models/line7. What only reads it takes
    an earlier version, too: s3://models/line7@3."""


def check_no_credentials(name: str, uri: str) -> None:
    """Raises: PadimError if a URI holds what mustn't be written down."""
    if redact(uri) != uri:
        raise PadimError(
            f"{name} holds credentials, which results would tell: give them in "
            "--storage-options or in the environment, or presigned images in a --manifest"
        )


def from_mapping(kind: type, options: Mapping[str, Any]) -> Any:
    """Options from keyword arguments, which may be named as on the command line.

    Raises:
        PadimError: for an unknown name, or if one that is needed is missing.
    """
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise PadimError(f"Unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    missing = {"model", "out"} & known - set(options)
    if missing:
        raise PadimError(f"{flag(min(missing))} is needed")
    return kind(**options)


def check_choices(options: Any) -> None:
    """Raises: PadimError if an option has a value that is not among its choices."""
    choices = {
        "regularization": ("shrink", "paper"),
        "precision": ("auto", "float32", "bfloat16"),
        "calibrate": ("readable", "none"),
        "heatmaps": ("anomalous", "all", "none", "top"),
    }
    for name, allowed in choices.items():
        value = getattr(options, name, allowed[0])
        if value not in allowed:
            raise PadimError(f"{flag(name)} must be one of {', '.join(allowed)}, not {value!r}")


def check_share(name: str, value: float) -> None:
    """Raises: PadimError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise PadimError(f"{flag(name)} must be above 0 and below 1, but is {value}")


def check_number(name: str, value: float) -> None:
    """Raises: PadimError for a negative, infinite or NaN value."""
    if not math.isfinite(value):
        raise PadimError(f"{flag(name)} must be a finite number, but is {value}")
    if value < 0:
        raise PadimError(f"{flag(name)} must not be negative, but is {value}")


def flag(name: str) -> str:
    """An option as it is written on the command line: `--max-failed`."""
    return "--" + name.replace("_", "-")
