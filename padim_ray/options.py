"""Every option of the jobs, typed: one place behind the command line, YAML files and Python."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from padim_ray.errors import PadimError
from padim_ray.redaction import redact

IMAGES = Group("Images", sort_key=1)
MODEL = Group("Model", sort_key=2)
RESULTS = Group("Results", sort_key=3)
RUN = Group("Run", sort_key=4)

MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 256 * 2**20
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
Sizes = Annotated[
    tuple[int, ...] | None,
    Parameter(
        group=MODEL,
        consume_multiple=True,
        negative_iterable="",
        negative_none="",
        show_default=lambda sizes: " ".join(map(str, sizes)) if sizes else "no crop",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What features of an image a model has: all that its size and speed depend on."""

    backbone: Annotated[str, Parameter(group=MODEL)] = "resnet18"
    """ResNet of torchvision: resnet18/34/50/101/152, wide_resnet50_2, resnext50_32x4d, …"""

    layers: Annotated[
        tuple[str, ...],
        Parameter(group=MODEL, consume_multiple=True, negative_iterable="", show_default=" ".join),
    ] = ("layer1", "layer2", "layer3")
    """Layers whose features are used, separated by spaces or commas."""

    image_size: Sizes = (256,)
    """Height and width that images are resized to (one number: square), in pixels."""

    crop: Sizes = None
    """Height and width of the centre kept after resizing (the paper: 224)."""

    scaled_jpeg: Annotated[bool, Parameter(group=MODEL, negative="", show_default=False)] = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size: faster, but other pixels.
    The model keeps to it when it scores."""

    n_features: Annotated[int | Literal["all"] | None, Parameter(group=MODEL, negative_none="")] = (
        None
    )
    """Channels kept in all layers together, drawn by the seed, or all. Default: all for resnet18
    and resnet34, 550 for the others (the paper: 100 for resnet18, 550 for wide_resnet50_2)."""

    seed: Annotated[int, Parameter(group=MODEL)] = 42
    """Seed of the draws of channels and of calibration images."""

    precision: Annotated[Literal["auto", "float32", "bfloat16"], Parameter(group=MODEL)] = "auto"
    """Precision of the trunk. auto: the fastest that the workers compute natively."""

    def __post_init__(self) -> None:
        _check_choices(self)
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        split = tuple(name for layer in layers for name in layer.split(",") if name)
        object.__setattr__(self, "layers", split)
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        if self.crop is not None:
            object.__setattr__(self, "crop", _pair("crop", self.crop))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions(FeatureOptions):
    """What makes a model, apart from its images."""

    weights: Annotated[str, Parameter(group=MODEL)] = "IMAGENET1K_V1"
    """torchvision weights name, or path or URI of a .pth or .safetensors state dict (its trunk is
    enough)."""

    regularization: Annotated[Literal["shrink", "paper"], Parameter(group=MODEL)] = "shrink"
    """shrink: towards the covariance averaged over all positions. paper: a constant on the
    diagonal."""

    shrinkage: Annotated[float, Parameter(group=MODEL)] = 0.1
    """Weight of the averaged covariance (shrink)."""

    ridge: Annotated[float, Parameter(group=MODEL)] = 0.01
    """Added to the diagonal, in units of the layer's mean variance (shrink)."""

    epsilon: Annotated[float, Parameter(group=MODEL)] = 0.01
    """Added to the diagonal (paper)."""

    sigma: Annotated[float, Parameter(group=MODEL)] = 4.0
    """Standard deviation of the anomaly map's smoothing, in pixels; 0: none."""

    def __post_init__(self) -> None:
        FeatureOptions.__post_init__(self)
        for name in ("sigma", "shrinkage", "ridge", "epsilon"):
            _check_number(name, getattr(self, name))


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
        _check_choices(self)
        sizes = ("max_image_pixels", "max_image_bytes", "group_memory")
        for name in ("batch_size", "actors", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PadimError(f"{_flag(name)} must be at least 1, but is {value}")
        if self.gpus is not None and self.gpus < 0:
            raise PadimError(f"--gpus must be at least 0, but is {self.gpus}")
        for name in ("images", "manifest", "model", "out", "decode_resource"):
            if getattr(self, name, None) == "":
                raise PadimError(f"{_flag(name)} is empty")
        for name in ("images", "masks", "model", "out"):
            value = getattr(self, name, None)
            if value is not None:
                check_no_credentials(_flag(name), value)
        if self.max_failed is not None:
            _check_number("max_failed", self.max_failed)

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
class MergeOptions(RoundOptions):
    """Options of `merge`."""

    model: Annotated[str, Parameter(group=MODEL)]
    """Directory of the merged model: a path, or a URI. If there is a model, this is its next
    version, which has that model's images only if it is among those that are merged."""

    calibrate: Annotated[Literal["readable", "none"], Parameter(group=MODEL)] = "readable"
    """Which images make thresholds and p-values of groups that are in several models. readable:
    those of the sample that can be read from here. none: these groups have none, until an update.
    """


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareOptions(ImagesOptions):
    """Options of `compare`."""

    out: Annotated[str, Parameter(group=RESULTS)]
    """Directory of the comparison: a path or a URI."""

    alpha: Annotated[float, Parameter(group=RESULTS)] = 0.01
    """False-alarm rate, from which both models' thresholds follow."""

    report_images: Annotated[int, Parameter(group=RESULTS)] = 50
    """Images in the report's gallery: those that changed most, with both heatmaps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("alpha", self.alpha)
        _check_number("report_images", self.report_images)


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
        _check_number("calibration_images", self.calibration_images)

    @property
    def model_options(self) -> ModelOptions:
        return ModelOptions(
            **{field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JobOptions):
    """Options of `score`."""

    out: Annotated[str, Parameter(group=RESULTS)]
    """Directory of the results: a path or a URI."""

    alpha: Annotated[float, Parameter(group=RESULTS)] = 0.01
    """False-alarm rate: the share of good images that may be called anomalous. Thresholds follow
    from it and from the training images' leave-one-out scores."""

    threshold: Annotated[float | None, Parameter(group=RESULTS, negative_none="")] = None
    """Score above which images are anomalous, for all groups, instead of the thresholds of alpha.
    """

    pixel_alpha: Annotated[float, Parameter(group=RESULTS)] = 0.001
    """Share of good images' pixels that may look anomalous: what regions are cut out with."""

    min_region_area: Annotated[int, Parameter(group=RESULTS)] = 0
    """Smallest region to report of an anomalous image, in pixels of the image."""

    heatmaps: Annotated[Literal["anomalous", "all", "none", "top"], Parameter(group=RESULTS)] = (
        "anomalous"
    )
    """Images to draw heatmaps of. anomalous: those, and what the report shows. top: those that
    exceed their threshold most, or come nearest to it."""

    top: Annotated[int, Parameter(group=RESULTS)] = 100
    """How many heatmaps 'top' means."""

    report_images: Annotated[int, Parameter(group=RESULTS)] = 200
    """Images in the report's gallery: the most anomalous ones."""

    maps: Annotated[bool, Parameter(group=RESULTS, negative="", show_default=False)] = False
    """Also write every anomaly map as a float32 TIFF."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise PadimError(f"--top must be at least 1, but is {self.top}")
        for name in ("alpha", "pixel_alpha"):
            _check_share(name, getattr(self, name))
        for name in ("threshold", "min_region_area", "report_images"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoreOptions):
    """Options of `evaluate`."""

    masks: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Masks of the defects, such as 'archive/{group}/ground_truth/{defect}/{name}_mask.png': what
    it captures, --images must capture too. Without it only images are judged, not pixels."""

    normal: Annotated[str, Parameter(group=IMAGES)] = "good"
    """The value of {defect} that means a good image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks is not None and self.manifest is not None:
            raise PadimError("--masks needs --images; a manifest has a column 'mask_uri' instead")


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
                raise PadimError(f"{_flag(name)} must be at least 1, but is {value}")
        for name in ("gpus", "sample", "calibration_images"):
            _check_number(name, getattr(self, name))
        for name in ("rate", "gpu_memory"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PadimError(f"{_flag(name)} must be above 0, but is {value}")
        if self.model is not None:
            defaults = FeatureOptions()
            for field in fields(FeatureOptions):
                if getattr(self, field.name) != getattr(defaults, field.name):
                    raise PadimError(f"{_flag(field.name)} is the model's: leave it out")


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
        raise PadimError(f"{_flag(min(missing))} is needed")
    return kind(**options)


def _check_choices(options: Any) -> None:
    choices = {
        "regularization": ("shrink", "paper"),
        "precision": ("auto", "float32", "bfloat16"),
        "calibrate": ("readable", "none"),
        "heatmaps": ("anomalous", "all", "none", "top"),
    }
    for name, allowed in choices.items():
        value = getattr(options, name, allowed[0])
        if value not in allowed:
            raise PadimError(f"{_flag(name)} must be one of {', '.join(allowed)}, not {value!r}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise PadimError(f"{_flag(name)} must be above 0 and below 1, but is {value}")


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise PadimError(f"{_flag(name)} must be a finite number, but is {value}")
    if value < 0:
        raise PadimError(f"{_flag(name)} must not be negative, but is {value}")


def _pair(name: str, sizes: int | Sequence[int] | None) -> tuple[int, int]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes or ())
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise PadimError(f"{_flag(name)} takes one or two positive numbers, not {sizes}")
    return sizes[0], sizes[-1]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
