"""Options that several jobs share, and the checks of their values.

The command line, YAML files and Python all construct these dataclasses, so an option is declared
and checked once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from padim_ray.errors import PadimError
from padim_ray.images.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from padim_ray.redaction import redact

IMAGES = Group("Images", sort_key=1)
MODEL = Group("Model", sort_key=2)
RESULTS = Group("Results", sort_key=3)
RUN = Group("Run", sort_key=4)
GROUP_MEMORY = 2 * 2**30
EMBEDDING_MEMORY = 2 * 2**30
MAX_UNREADABLE_SHARE, MAX_UNREADABLE = 0.01, 10
"""Images that may be unreadable without --max-failed. An archive has a few truncated uploads; more
of them mean another format, a broken camera or a wrong template, and so a model or a night that
can't be trusted. Of few images, one per cent says nothing."""


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
    Parameter(
        group=RUN,
        converter=_parse_json,
        accepts_keys=False,
        n_tokens=1,
        show_default=False,
        help="""Options for fsspec, as JSON: '{"endpoint_url": "http://minio:9000"}' for every store
        but web servers, or by protocol: '{"s3": {"endpoint_url": …}, "https": {"headers": …}}'.""",
    ),
]

GPUS = Parameter(
    group=RUN,
    negative_none="",
    show_default=lambda gpus: "all of the cluster's" if gpus is None else gpus,
    help="Maximum number of GPUs to compute on; 0: compute on CPUs. A job starts as soon as there "
    "is one, and asks an autoscaler for as many as its images are worth.",
)
"""`--gpus` of the jobs and of `plan`, whose defaults differ."""

ReportImages = Annotated[
    int,
    Parameter(
        group=RESULTS,
        help="Images in the report's gallery: the most anomalous ones; of a comparison, those "
        "whose scores changed most.",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options. Each subclass checks its own values, then calls `super()`."""

    def __post_init__(self) -> None:
        check_choices(self)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """Where the images are listed: one of the two is given."""

    images: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Images to read, such as 's3://archive/{group}/train/good/*.png'. {name} captures a path
    segment, or part of one, as a column; {group} is the image's group, and each group has its own
    Gaussians. *, ? and ** match as in a shell."""

    manifest: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Parquet file that lists the images, instead of --images. It has a column uri, and optionally
    group and others."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.manifest is None):
            raise PadimError("Say which images to read: either --images or --manifest")
        super().__post_init__()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LimitOptions(Options):
    """Which images are too large."""

    max_image_pixels: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_PIXELS
    """An image with more pixels fails before it is decoded."""

    max_image_bytes: Annotated[int, Parameter(group=IMAGES)] = MAX_IMAGE_BYTES
    """A larger file fails before it is read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("max_image_pixels", self.max_image_pixels)
        check_positive("max_image_bytes", self.max_image_bytes)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions(LimitOptions):
    """How any job runs."""

    group_memory: Annotated[int, Parameter(group=RUN)] = GROUP_MEMORY
    """Memory for Gaussians on each actor's device while scoring, in bytes. The groups used least
    recently are dropped, and the next group is loaded ahead if it fits. One group is always kept.
    """

    batch_size: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """Images per forward pass of the trunk. Default: 8 on CPUs, 256 on GPUs."""

    actors: Annotated[int | None, Parameter(group=RUN, negative_none="")] = None
    """Actors, the workers that hold the trunk. Default: one per GPU, or without GPUs one per 8
    cores; more when nodes join."""

    gpus: Annotated[int | None, GPUS] = None

    decode_resource: Annotated[str | None, Parameter(group=RUN, negative_none="")] = None
    """Ray resource of the nodes that decode, merge, draw and write, such as padim_decode. The other
    nodes, such as those with GPUs, then run actors only."""

    max_failed: Annotated[float | None, Parameter(group=RUN, negative_none="")] = None
    """Stop with exit code 3 when more images than this fail: a number of images or, if below 1, a
    share of those listed. Default: 1 % of them may be unreadable, or 10 if that is more, and none
    unfetched: with an image that can't be fetched the job isn't complete."""

    overwrite: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """Start afresh instead of continuing an earlier attempt. A run's results are replaced; a model
    gets a new version."""

    storage_options: StorageOptions = None

    address: Annotated[str | None, Parameter(group=RUN, negative_none="")] = None
    """Ray cluster to run on ('auto': the one on this machine). Default: RAY_ADDRESS, which Ray sets
    for submitted jobs; without it Ray starts in this process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "actors", "group_memory"):
            check_positive(name, getattr(self, name))
        if self.gpus is not None:
            check_number("gpus", self.gpus)
        if self.max_failed is not None:
            check_number("max_failed", self.max_failed)
        for name in ("images", "manifest", "model", "out", "decode_resource"):
            if getattr(self, name, None) == "":
                raise PadimError(f"{flag_name(name)} is empty")
        for name in ("images", "masks", "model", "out"):
            value = getattr(self, name, None)
            if value is not None:
                check_no_credentials(flag_name(name), value)

    def allows(self, failed: int, listed: int) -> bool:
        """Whether this many failed images are within --max-failed, or within its default."""
        if self.max_failed is None:
            return failed <= max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * listed)
        # a quotient is rounded to the same float as the share that was typed; a product is not
        return (failed / listed if self.max_failed < 1 else failed) <= self.max_failed

    def describe_max_failed(self) -> str:
        """The limit that `allows` checks, in words."""
        if self.max_failed is not None:
            return f"--max-failed {self.max_failed:g}"
        return f"{MAX_UNREADABLE_SHARE:.0%} of the listed ones and more than {MAX_UNREADABLE}"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ImagesOptions(RunOptions, SourceOptions):
    """Options of a job that reads images."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobOptions(ImagesOptions):
    """Options of a job that reads images for one model."""

    model: Annotated[str, Parameter(group=IMAGES)]
    """Directory of the model: a path, or a URI such as s3://models/line7. score and evaluate also
    take a version, s3://models/line7@3."""


def check_no_credentials(name: str, uri: str) -> None:
    """Raises: PadimError if a URI holds credentials, which results would repeat."""
    if redact(uri) != uri:
        raise PadimError(
            f"{name} holds credentials, which the results would disclose. Give them in "
            "--storage-options or the environment, or list presigned URIs in a --manifest"
        )


def from_mapping(kind: type, options: Mapping[str, Any]) -> Any:
    """Construct options of a kind from keyword arguments.

    Raises:
        PadimError: for an unknown name, or if `model` or `out` is missing.
    """
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise PadimError(f"Unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    missing = {"model", "out"} & known - set(options)
    if missing:
        raise PadimError(f"{flag_name(min(missing))} is needed")
    return kind(**options)


def check_choices(options: Any) -> None:
    """Raises: PadimError if an option that is a `Literal` has a value outside it."""
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            allowed = ", ".join(get_args(kind))
            raise PadimError(f"{flag_name(name)} must be one of {allowed}, not {value!r}")


def check_share(name: str, value: float) -> None:
    """Raises: PadimError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise PadimError(f"{flag_name(name)} must be above 0 and below 1, but is {value}")


def check_number(name: str, value: float) -> None:
    """Raises: PadimError for a negative, infinite or NaN value."""
    if not math.isfinite(value):
        raise PadimError(f"{flag_name(name)} must be a finite number, but is {value}")
    if value < 0:
        raise PadimError(f"{flag_name(name)} must not be negative, but is {value}")


def check_positive(name: str, value: int | None) -> None:
    """Raises: PadimError for a value below 1; None is allowed."""
    if value is not None and value < 1:
        raise PadimError(f"{flag_name(name)} must be at least 1, but is {value}")


def flag_name(name: str) -> str:
    """An option's name on the command line: `max_failed` is `--max-failed`."""
    return "--" + name.replace("_", "-")
