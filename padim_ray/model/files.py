"""Read the files of a model directory safely: they may be damaged or hostile.

A file's place, size and header are checked before its content is read. Any fault raises a
ModelError that names the file. No code from a file is run, and no more memory is allocated than a
valid file needs.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from pyarrow import ArrowException
from safetensors import SafetensorError, safe_open

from padim_ray.errors import ModelError
from padim_ray.storage.location import Location

HEADER_BYTES = 2**20  # for the header of a safetensors file, or Parquet's metadata
T = TypeVar("T")
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def read_file(root: Location, location: Location, max_bytes: int, parse: Callable[[Path], T]) -> T:
    """As `parse_file`, for a file that must exist.

    Raises:
        ModelError: if it is missing or refused.
    """
    try:
        return parse_file(root, location, max_bytes, parse)
    except FileNotFoundError as error:
        raise ModelError(f"The model is incomplete: {location.uri} is missing") from error


def parse_file(root: Location, location: Location, max_bytes: int, parse: Callable[[Path], T]) -> T:
    """Parse a file of the model at `root`.

    Args:
        root: the model's directory.
        location: the file.
        max_bytes: a larger file is refused.
        parse: parses a local copy of the file.

    Raises:
        FileNotFoundError: if it is missing.
        ModelError: if it is too large, outside the model's directory, or `parse` refuses it.
    """
    with naming_file(location):
        _check(root, location, max_bytes)
        with location.as_local_file() as path:
            return parse(path)


@contextmanager
def naming_file(location: Location) -> Iterator[None]:
    """Turn errors within the context into a ModelError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, ModelError, ValueError, OSError, MemoryError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{location.uri} can't be understood: {reason}") from error


def _check(root: Location, location: Location, max_bytes: int) -> None:
    size: int | None
    if location.is_local:
        file = os.stat(location.uri)
        if not stat.S_ISREG(file.st_mode):
            raise ModelError("it is not a regular file")
        inside, real = os.path.realpath(root.uri), os.path.realpath(location.uri)
        if os.path.commonpath([inside, real]) != inside:
            raise ModelError("it is a link that leads out of the model's directory")
        size = file.st_size
    else:
        size = location.size()
    if size is None or size > max_bytes:
        raise ModelError(f"it has {size} bytes, and not at most {max_bytes}")


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


def read_table(
    root: Location,
    location: Location,
    columns: Mapping[str, pa.DataType],
    rows: range,
    *,
    parse: Callable[[pa.Table], T] = lambda table: table,
    max_bytes: int | None = None,
) -> T:
    """Parse a Parquet file.

    Args:
        root: the model's directory.
        location: the file.
        columns: the columns that it must have, by name, without nulls.
        rows: the numbers of rows that it may have.
        parse: makes something of the table. Default: returns the table itself.
        max_bytes: maximum size of the file and its columns; if given, the file may have other
            columns as well. Default: derived from `columns` and `rows`.

    Raises:
        ModelError: if the file is missing or different, or `parse` refuses it.
    """
    limit = max_bytes or HEADER_BYTES + 16 * len(columns) * rows[-1]

    def read(path: Path) -> T:
        with pq.ParquetFile(path) as file:
            _check_parquet(file, columns, rows, limit, has_others=max_bytes is not None)
            table = file.read()
        for name in columns:
            if table[name].null_count:
                raise ModelError(f"{name!r} has nulls")
        return parse(table)

    return read_file(root, location, limit, read)


def _check_parquet(
    file: pq.ParquetFile,
    columns: Mapping[str, pa.DataType],
    rows: range,
    max_bytes: int,
    *,
    has_others: bool,
) -> None:
    metadata, schema = file.metadata, file.schema_arrow
    if metadata.num_rows not in rows:
        raise ModelError(f"it has {metadata.num_rows} rows, not {rows[0]} to {rows[-1]}")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ModelError("it contradicts itself about its rows")
    if sum(group.total_byte_size for group in groups) > max_bytes:
        raise ModelError(f"its columns have more than {max_bytes} bytes")
    names = schema.names
    for name, kind in columns.items():
        if names.count(name) != 1 or schema.field(name).type != kind:
            raise ModelError(f"it has no column {name!r} of type {kind}")
    if not has_others and len(names) != len(columns):
        raise ModelError(f"it has other columns than {', '.join(columns)}")
