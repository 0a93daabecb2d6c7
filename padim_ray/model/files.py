"""Read the tensors of a model directory safely: the files may be damaged or hostile.

As in `storage.untrusted`, any fault raises a ModelError that names the file, and no more memory is
allocated than a valid file needs.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open

from padim_ray.errors import ModelError
from padim_ray.storage.location import Location
from padim_ray.storage.untrusted import HEADER_BYTES, read_file

T = TypeVar("T")
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def load_in_order(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in the order of `names`: the file has an order of its own.

    Raises:
        KeyError: if one is missing.
    """
    tensors = safetensors.torch.load_file(path)
    return {name: tensors[name] for name in names}


def load_tensors(
    root: Location,
    location: Location,
    expected: Mapping[str, torch.Tensor],
    parse: Callable[[Mapping[str, torch.Tensor]], T],
) -> T:
    """Parse a safetensors file whose tensors are known by name, shape and type.

    Args:
        root: the model's directory.
        location: the file.
        expected: tensors of the same names, shapes and types, for example on the meta device.
        parse: makes something of the file's tensors, which are finite and in the order of
            `expected`.

    Raises:
        ModelError: if the file is missing, holds other tensors, NaN or infinity, or `parse` refuses
            it.
    """

    def read(path: Path) -> T:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), set(expected))
            for name, tensor in expected.items():
                _check_kind(name, file.get_slice(name), tensor)
        tensors = load_in_order(path, expected)
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
        return parse(tensors)

    max_bytes = HEADER_BYTES + sum(tensor.nbytes for tensor in expected.values())
    return read_file(root, location, max_bytes, read)


def load_trunk(root: Location, location: Location, max_bytes: int) -> dict[str, torch.Tensor]:
    """Read a safetensors file of float32 weights.

    Raises:
        ModelError: if it is missing, too large, or no such file.
    """

    def read(path: Path) -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # `file` itself is not iterable
            kinds = {file.get_slice(name).get_dtype() for name in names}
        if kinds != {"F32"}:
            raise ModelError(f"weights are float32, and these {', '.join(sorted(kinds))}")
        return safetensors.torch.load_file(path)

    return read_file(root, location, max_bytes, read)


def _check_kind(name: str, found: Any, expected: torch.Tensor) -> None:
    dtype, shape = found.get_dtype(), found.get_shape()
    expected_dtype, expected_shape = _DTYPES[expected.dtype], list(expected.shape)
    if (dtype, shape) != (expected_dtype, expected_shape):
        raise ModelError(f"{name} is {dtype} {shape}, not {expected_dtype} {expected_shape}")


def _check_names(found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, others = sorted(expected - found), sorted(found - expected)
        raise ModelError(
            f"it is not of this model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(others)} are of something else {[name[:40] for name in others[:3]]}"
        )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    # the extremes are NaN if any value is; unlike a mask they take no memory
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise ModelError(f"{name} has NaN or infinite values")
