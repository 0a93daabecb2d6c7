"""A model's specification: all settings that its results depend on, stored as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, get_args

from padim_ray.densities import density_of_json, density_of_options
from padim_ray.densities.base import Density
from padim_ray.errors import ModelError
from padim_ray.features.cells import MAX_NEIGHBOURHOOD, MAX_STRIDE, cell_grids
from padim_ray.features.grid import PatchGrid
from padim_ray.features.trunk import Precision
from padim_ray.features.trunks import ALL, check_levels, choose_channels, find_trunk
from padim_ray.features.weights import StateDict, read_weights, weights_sha256
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.redaction import redact
from padim_ray.runs.options.model import FeatureOptions, ModelOptions
from padim_ray.runs.options.model import pair as pair_of_sizes
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.storage.json_fields import (
    flag,
    mapping,
    number,
    pair,
    read_fields,
    several,
    text,
    whole,
)

MAX_SIDE = 4096  # pixels; features and anomaly maps of larger images need too much memory
MAX_SIGMA = 256  # pixels
MAX_SEARCH = 4  # cells
_NUMBERS = pair(number)
_SIDES = pair(whole(1, MAX_SIDE))
_PREPROCESSING = {
    "resize": _SIDES,
    "crop": lambda value, where: None if value is None else _SIDES(value, where),
    "scaled_jpeg": flag,
    "grey_range": lambda value, where: None if value is None else _NUMBERS(value, where),
    "letterbox": flag,
}


def _read_channels(value: Any, where: str) -> dict[str, list[int]]:
    indices = several(whole(0, 2**16), most=2**16)
    return {
        text(".{1,100}")(layer, f"a layer of {where}"): indices(kept, f"{where}.{layer}")
        for layer, kept in mapping(value, where).items()
    }


_SPEC = {
    "backbone": text(".{1,100}"),
    "weights": text(".{0,4096}"),
    "weights_sha256": text("[0-9a-f]{64}"),  # becomes a file's name
    "channels": _read_channels,
    "preprocessing": lambda value, where: read_fields(Preprocessing, value, where, _PREPROCESSING),
    "density": density_of_json,
    "precision": text(".{1,100}"),
    "sigma": number,
    "stride": whole(1, MAX_STRIDE),
    "neighbourhood": whole(1, MAX_NEIGHBOURHOOD),
    "score_share": number,
    "search": whole(0, MAX_SEARCH),
    "search_maps": flag,
}


@dataclass(frozen=True)
class ModelSpec:
    """All settings that embeddings, distances and maps depend on; nothing fitted.

    Attributes:
        backbone: the trunk's name.
        weights: where the trunk's weights came from, for people.
        weights_sha256: hash of the trunk's weights.
        channels: ascending indices of the kept channels of each used level, finest first.
        preprocessing: how images are resized and cropped.
        density: the density with its settings.
        precision: the trunk's precision.
        sigma: standard deviation of the anomaly map's smoothing, in pixels.
        stride: side of a cell, in pixels of the input; levels that are coarser keep their cells.
        neighbourhood: side of the square of positions that features are averaged over first.
        score_share: share of the cells whose mean distance is the image's score; 0: the score is
            the map's maximum.
        search: rows and columns around a cell whose density it is measured against, too.
        search_maps: whether maps are made of searched distances; otherwise scores only.

    Raises:
        ModelError: if the settings are invalid or don't fit together.
    """

    backbone: str
    weights: str
    weights_sha256: str
    channels: Mapping[str, Sequence[int]]
    preprocessing: Preprocessing
    density: Density[Any, Any, Any]
    precision: Precision
    sigma: float
    stride: int
    neighbourhood: int
    score_share: float
    search: int
    search_maps: bool

    def __post_init__(self) -> None:
        check_levels(self.backbone, list(self.channels))
        if self.precision not in get_args(Precision):
            raise ModelError(f"Unknown precision {self.precision!r}")
        check_sides(self.preprocessing)
        cell_grids(self.preprocessing.size, self._strides, self.stride)  # raises if they don't fit
        if not 0 < self.neighbourhood <= MAX_NEIGHBOURHOOD or self.neighbourhood % 2 == 0:
            raise ModelError(
                f"neighbourhood must be odd and at most {MAX_NEIGHBOURHOOD}, not "
                f"{self.neighbourhood}"
            )
        if not 0 <= self.score_share <= 1:
            raise ModelError(f"score_share must be from 0 to 1, not {self.score_share}")
        if not 0 <= self.search <= MAX_SEARCH:
            raise ModelError(f"search must be from 0 to {MAX_SEARCH} cells, not {self.search}")
        if self.search and not self.density.searches:
            raise ModelError(f"The density {self.density.kind} can't search: leave out --search")
        if not 0 <= self.sigma <= MAX_SIGMA:
            raise ModelError(f"sigma must be from 0 to {MAX_SIGMA} pixels, not {self.sigma}")
        self._check_channels()

    def _check_channels(self) -> None:
        every = _every_channel(self.backbone, tuple(self.channels))
        if list(self.channels) != list(every):
            raise ModelError(f"The channels' layers must be in the order {', '.join(every)}")
        if not any(self.channels.values()):
            raise ModelError("There are no channels")
        for layer, kept in self.channels.items():
            if not set(kept) <= set(every[layer]) or list(kept) != sorted(set(kept)):
                raise ModelError(
                    f"The channels of {layer} must be ascending, each once, and below "
                    f"{len(every[layer])}"
                )

    @cached_property
    def grid(self) -> PatchGrid:
        return PatchGrid(
            cell_grids(self.preprocessing.size, self._strides, self.stride),
            tuple(len(indices) for indices in self.channels.values()),
        )

    @property
    def _strides(self) -> list[int]:
        levels = find_trunk(self.backbone).levels
        return [levels[layer].stride for layer in self.channels]

    @property
    def mapper(self) -> AnomalyMapper:
        return AnomalyMapper(self.grid.grids[0], self.preprocessing.size, self.sigma)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"density": self.density.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> "ModelSpec":
        """Read a specification: the inverse of `to_json`.

        Args:
            value: a JSON object, as anybody may have written it.

        Raises:
            ModelError: if a field is missing, unknown or invalid.
        """
        return read_fields(cls, value, "spec", _SPEC)


@lru_cache
def _every_channel(backbone: str, layers: tuple[str, ...]) -> Mapping[str, Sequence[int]]:
    return choose_channels(backbone, layers, ALL, seed=0)


def new_spec(
    options: ModelOptions, precision: Precision, storage_options: Mapping[str, Any] | None = None
) -> tuple[ModelSpec, StateDict]:
    """Make a new model's specification, and read its trunk's weights.

    Args:
        options: the model's options.
        precision: the trunk's precision; "auto" has been resolved.
        storage_options: fsspec's, for weights on an object store.

    Raises:
        ModelError: if the options don't fit together, or the weights can't be read.
    """
    layers = options.layers or ()
    trunk = check_levels(options.backbone, layers)
    channels = choose_channels(options.backbone, layers, options.n_features, options.seed)
    preprocessing = preprocessing_of(options)
    check_sides(preprocessing)
    strides = [trunk.levels[layer].stride for layer in channels]
    cell_grids(preprocessing.size, strides, options.stride)  # before weights are downloaded
    weights = read_weights(options.weights, options.backbone, list(channels), storage_options)
    spec = ModelSpec(
        backbone=options.backbone,
        weights=redact(options.weights),
        weights_sha256=weights_sha256(weights),
        channels=channels,
        preprocessing=preprocessing,
        density=density_of_options(options),
        precision=precision,
        sigma=options.sigma,
        stride=options.stride,
        neighbourhood=options.neighbourhood,
        score_share=options.score_share,
        search=options.search,
        search_maps=options.search_maps,
    )
    return spec, weights


def preprocessing_of(options: FeatureOptions) -> Preprocessing:
    """The preprocessing that the options ask for.

    Raises:
        ModelError: if they don't fit together.
    """
    return Preprocessing(
        pair_of_sizes("image_size", options.image_size),
        pair_of_sizes("crop", options.crop) if options.crop else None,
        options.scaled_jpeg,
        options.grey_range,
        options.resize == "letterbox",
    )


def check_sides(preprocessing: Preprocessing) -> None:
    """Check that images aren't resized to more than the largest size.

    Raises:
        ModelError: if they are.
    """
    height, width = preprocessing.resize
    if max(height, width) > MAX_SIDE:
        raise ModelError(f"The image size {height}×{width} is above {MAX_SIDE}×{MAX_SIDE}")
