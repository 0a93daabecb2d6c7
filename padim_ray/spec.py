"""What a model is apart from its numbers: the part of it that is stored as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

from padim_ray.anomaly_map import AnomalyMapper
from padim_ray.errors import ModelError
from padim_ray.gaussian import Regularization
from padim_ray.options import ModelOptions
from padim_ray.patches import PatchGrid
from padim_ray.preprocessing import Preprocessing
from padim_ray.trunk import (
    STRIDES,
    Precision,
    StateDict,
    check_layers,
    choose_channels,
    read_weights,
    weights_sha256,
)


@dataclass(frozen=True)
class ModelSpec:
    """Trunk, channels, preprocessing and regularisation: all that embeddings and maps depend on.

    `channels` holds each used layer's kept channel indices, finest layer first; `precision` is the
    trunk's, resolved; `sigma` the anomaly map's smoothing in pixels.
    """

    backbone: str
    weights: str
    weights_sha256: str
    channels: Mapping[str, Sequence[int]]
    preprocessing: Preprocessing
    regularization: Regularization
    precision: Precision
    sigma: float

    def __post_init__(self) -> None:
        check_layers(self.backbone, list(self.channels))
        if self.precision not in get_args(Precision):
            raise ModelError(f"Unknown precision {self.precision!r}")
        check_size(self.preprocessing.size, max(STRIDES[layer] for layer in self.channels))

    @cached_property
    def grid(self) -> PatchGrid:
        height, width = self.preprocessing.size
        return PatchGrid(
            tuple((height // STRIDES[layer], width // STRIDES[layer]) for layer in self.channels),
            tuple(len(indices) for indices in self.channels.values()),
        )

    @property
    def mapper(self) -> AnomalyMapper:
        return AnomalyMapper(self.grid.grids[0], self.preprocessing.size, self.sigma)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelSpec":
        """Raises: ModelError if fields are missing, unknown or of the wrong kind."""
        try:
            parts = dict(value)
            parts["preprocessing"] = Preprocessing(
                **{name: size and tuple(size) for name, size in value["preprocessing"].items()}
            )
            parts["regularization"] = Regularization(**value["regularization"])
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"model.json can't be understood: {error}") from error


def new_spec(
    options: ModelOptions, precision: Precision, storage_options: Mapping[str, Any] | None = None
) -> tuple[ModelSpec, StateDict]:
    """Make a new model's spec and read its trunk's weights.

    Raises:
        ModelError: if the options don't fit together or the weights can't be had.
    """
    check_layers(options.backbone, options.layers)
    channels = choose_channels(options.backbone, options.layers, options.n_features, options.seed)
    preprocessing = Preprocessing(options.image_size, options.crop)
    check_size(preprocessing.size, max(STRIDES[layer] for layer in channels))
    weights = read_weights(options.weights, options.backbone, list(channels), storage_options)
    spec = ModelSpec(
        backbone=options.backbone,
        weights=options.weights,
        weights_sha256=weights_sha256(weights),
        channels=channels,
        preprocessing=preprocessing,
        regularization=Regularization(
            options.regularization, options.shrinkage, options.ridge, options.epsilon
        ),
        precision=precision,
        sigma=options.sigma,
    )
    return spec, weights


def check_size(size: tuple[int, int], stride: int) -> None:
    """Raises: ModelError if an input size isn't a multiple of the coarsest stride."""
    for pixels in size:
        if pixels % stride:
            below, above = pixels // stride * stride, (pixels // stride + 1) * stride
            nearest = f"{below} or {above}" if below else str(above)
            raise ModelError(
                f"The input size {size[0]}×{size[1]} is not a multiple of {stride}, the deepest "
                f"layer's stride; instead of {pixels} use {nearest}"
            )
