"""Read a trunk's weights from torchvision or a file, check and hash them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from padim_ray.errors import ModelError
from padim_ray.features.trunks import find_trunk
from padim_ray.storage.location import Location

StateDict = Mapping[str, torch.Tensor]


def load_state_dict(stages: nn.Module, state_dict: StateDict) -> None:
    """Load a trunk's weights. Other tensors (a classifier, deeper layers) are ignored.

    Args:
        stages: the trunk's modules, whose parameters may be on the meta device.
        state_dict: the weights, converted to float32.

    Raises:
        ModelError: if tensors are missing or have another shape; names the first of them.
    """
    wanted = {
        name: tensor.shape
        for name, tensor in stages.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise ModelError(
            f"The weights lack {len(missing)} of the trunk's {len(wanted)} tensors: "
            f"{_first(missing)}"
        )
    wrong = [
        f"{name} is {tuple(state_dict[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if state_dict[name].shape != shape
    ]
    if wrong:
        raise ModelError(f"The weights don't fit the backbone: {_first(wrong)}")
    stages.load_state_dict(
        {name: state_dict[name].float() for name in wanted}, strict=False, assign=True
    )


def _first(items: Sequence[str], shown: int = 4) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" * (len(items) > shown))


def read_weights(
    source: str,
    backbone: str,
    layers: Sequence[str],
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Read the weights of a trunk, up to its deepest used level.

    Args:
        source: the name of known weights, such as "IMAGENET1K_V1", or the path or URI of a state
            dict: a `.pth`, `.pt` or `.safetensors` file.
        backbone: the trunk's name.
        layers: the used levels.
        storage_options: fsspec's, for a URI.

    Raises:
        ModelError: if they can't be found or read, or don't fit the trunk.
    """
    if source.endswith((".pth", ".pt", ".safetensors")):
        state_dict = _read_file(Location.of(source, storage_options))
    else:
        state_dict = find_trunk(backbone).pretrained(source)
    stages = find_trunk(backbone).build(layers)
    load_state_dict(stages, state_dict)
    return {
        name: tensor.contiguous()
        for name, tensor in stages.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _read_file(location: Location) -> StateDict:
    try:
        with location.as_local_file() as path:
            content = _parse(path, location.uri)
    except FileNotFoundError as error:
        raise ModelError(f"There are no weights at {location.uri}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{location.uri} holds no plain state dict (names to tensors)")
    return content


def _parse(path: Path, uri: str) -> Any:
    path.stat()  # raises FileNotFoundError, which the block below would report as a broken file
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises nearly anything
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{uri} holds no plain state dict: {reason}") from error


def weights_sha256(state_dict: StateDict) -> str:
    """SHA-256 over names, shapes and values, which doesn't depend on the file's format."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        array = state_dict[name].float().contiguous().numpy()
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
