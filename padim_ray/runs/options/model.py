"""Options that make a model: trunk, preprocessing, density, anomaly map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from padim_ray.densities import DEFAULT as DEFAULT_DENSITY
from padim_ray.densities import DENSITIES, check_kind
from padim_ray.errors import PadimError
from padim_ray.features.trunks import DEFAULT as DEFAULT_TRUNK
from padim_ray.features.trunks import TRUNKS, find_trunk
from padim_ray.runs.options.common import MODEL, Options, check_number, flag_name

DEFAULT_LEVELS = TRUNKS[DEFAULT_TRUNK].default_levels
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
class FeatureOptions(Options):
    """Which features a model is made of; its size and speed depend on nothing else."""

    backbone: Annotated[
        str, Parameter(group=MODEL, help=f"Pretrained CNN: {', '.join(TRUNKS)}.")
    ] = DEFAULT_TRUNK

    layers: Annotated[
        tuple[str, ...] | None,
        Parameter(
            group=MODEL,
            consume_multiple=True,
            negative_iterable="",
            negative_none="",
            show_default=lambda layers: " ".join(layers or DEFAULT_LEVELS),
            help="Layers whose features are used, separated by spaces or commas.",
        ),
    ] = None

    image_size: Sizes = (256,)
    """Height and width to resize images to, in pixels; one number: a square."""

    crop: Sizes = None
    """Height and width of the centre crop after resizing, in pixels (the paper: 224)."""

    scaled_jpeg: Annotated[bool, Parameter(group=MODEL, negative="", show_default=False)] = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size. That is faster, but
    changes the pixels a little. The model keeps the setting for scoring."""

    resize: Annotated[Literal["stretch", "letterbox"], Parameter(group=MODEL)] = "stretch"
    """How images get the size. stretch: without regard to the aspect ratio. letterbox: with the
    same aspect ratio, on a plain background."""

    grey_range: Annotated[
        tuple[float, float] | None,
        Parameter(group=MODEL, negative_iterable="", negative_none="", show_default=False),
    ] = None
    """Values of grey pixels with more than 8 bits that become black and white, such as 0 4095 for
    12 bits in 16-bit files. The model keeps them for scoring. Default: 0 and what 16 bits hold."""

    n_features: Annotated[int | Literal["all"] | None, Parameter(group=MODEL, negative_none="")] = (
        None
    )
    """Number of channels to keep, drawn by --seed from all layers together, or all. Default: as
    many as suit the backbone, all of the default one's (the paper: 100)."""

    stride: Annotated[int, Parameter(group=MODEL)] = 16
    """Side of a cell, in pixels of the input. Features are averaged over a cell before the density.
    A layer whose positions are larger keeps its own (the paper: 4)."""

    neighbourhood: Annotated[int, Parameter(group=MODEL)] = 3
    """Side of the square of a layer's positions that features are averaged over before that; odd.
    1: no average (the paper)."""

    density: Annotated[
        str,
        Parameter(
            group=MODEL,
            help=f"Kind of density: {', '.join(DENSITIES)}. gaussian: one Gaussian per position "
            "(PaDiM). shared: one Gaussian for all positions.",
        ),
    ] = DEFAULT_DENSITY

    seed: Annotated[int, Parameter(group=MODEL)] = 42
    """Random seed for drawing channels and calibration images."""

    precision: Annotated[Literal["auto", "float32", "bfloat16"], Parameter(group=MODEL)] = "auto"
    """Precision of the trunk. auto: the one that is faster on the workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.density)  # an unknown one is an error before anything slow
        layers = self.layers or find_trunk(self.backbone).default_levels
        layers = (layers,) if isinstance(layers, str) else layers
        split = tuple(name for layer in layers for name in layer.split(",") if name)
        object.__setattr__(self, "layers", split)
        object.__setattr__(self, "image_size", pair("image_size", self.image_size))
        if self.crop is not None:
            object.__setattr__(self, "crop", pair("crop", self.crop))
        if self.grey_range is not None:
            object.__setattr__(self, "grey_range", _ascending("grey_range", self.grey_range))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions(FeatureOptions):
    """All settings of a model."""

    weights: Annotated[str, Parameter(group=MODEL)] = "IMAGENET1K_V1"
    """Name of torchvision weights, or path or URI of a .pth or .safetensors state dict, which needs
    to hold the trunk only."""

    regularization: Annotated[Literal["shrink", "paper"], Parameter(group=MODEL)] = "shrink"
    """How covariances are regularised. shrink: towards their average over all positions. paper: by
    a constant on the diagonal."""

    shrinkage: Annotated[float, Parameter(group=MODEL)] = 0.1
    """shrink: weight of the averaged covariance."""

    ridge: Annotated[float, Parameter(group=MODEL)] = 0.01
    """shrink: constant added to the diagonal, in units of the layer's mean variance."""

    epsilon: Annotated[float, Parameter(group=MODEL)] = 0.01
    """paper: constant added to the diagonal."""

    sigma: Annotated[float, Parameter(group=MODEL)] = 4.0
    """Standard deviation of the Gaussian that smooths the anomaly map, in pixels. 0: no smoothing.
    """

    score_share: Annotated[float, Parameter(group=MODEL)] = 0.01
    """Share of the cells, the most distant ones, whose mean is an image's score. 0: the maximum of
    the anomaly map is the score (the paper)."""

    search: Annotated[int, Parameter(group=MODEL)] = 0
    """Rows and columns of cells around a cell whose Gaussians it is measured against, too; the
    smallest distance counts. 1 is for parts that aren't aligned. It changes scores only."""

    search_maps: Annotated[bool, Parameter(group=MODEL, negative="")] = False
    """With --search, make maps of the searched distances as well, which takes longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("search", "score_share", "sigma", "shrinkage", "ridge", "epsilon"):
            check_number(name, getattr(self, name))


def pair(name: str, sizes: int | Sequence[int] | None) -> tuple[int, int]:
    """One or two positive sizes as (height, width)."""
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes or ())
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise PadimError(f"{flag_name(name)} takes one or two positive numbers, not {sizes}")
    return sizes[0], sizes[-1]


def _ascending(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not values[0] < values[1]:
        raise PadimError(f"{flag_name(name)} takes two ascending numbers, not {tuple(values)}")
    return float(values[0]), float(values[1])
