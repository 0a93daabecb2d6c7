"""Reading a model directory's files, which anybody may have written.

A file is looked at before it is read: where it is, how large, what its header says that it holds.
Whatever is wrong with it is a ModelError that names it; nothing in it is run, and no more memory is
taken than a file of its kind needs.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
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

HEADER_BYTES = 2**20  # of tensors' names and shapes, and of Parquet's around its columns
T = TypeVar("T")
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def read_file(root: Location, location: Location, most: int, parse: Callable[[Path], T]) -> T:
    """See `parse_file`; of a file that must be there.

    Raises:
        ModelError: also if it is missing.
    """
    try:
        return parse_file(root, location, most, parse)
    except FileNotFoundError as error:
        raise ModelError(f"The model is incomplete: {location.uri} is missing") from error


def parse_file(root: Location, location: Location, most: int, parse: Callable[[Path], T]) -> T:
    """Parse a file of the model at `root` that has at most `most` bytes.

    Raises:
        FileNotFoundError: if it is missing.
        ModelError: if it is larger, no file of the model's, or `parse` refuses it.
    """
    with understood(location):
        _check(root, location, most)
        with location.as_local_file() as path:
            return parse(path)


@contextmanager
def understood(location: Location) -> Iterator[None]:
    """Turn what is wrong with a file into a ModelError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, ModelError, ValueError, OSError, MemoryError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{location.uri} can't be understood: {reason}") from error


def _check(root: Location, location: Location, most: int) -> None:
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
    if size is None or size > most:
        raise ModelError(f"it has {size} bytes, and not at most {most}")


def load_tensors(
    root: Location,
    location: Location,
    expected: Mapping[str, torch.Tensor],
    parse: Callable[[Mapping[str, torch.Tensor]], T],
) -> T:
    """Parse a safetensors file of tensors like `expected`, which may be on the meta device.

    Raises:
        ModelError: if it is missing, holds others, of another shape or type, NaN or infinity, or
            `parse` refuses them.
    """

    def read(path: Path) -> T:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), set(expected))
            for name, tensor in expected.items():
                _check_kind(name, file.get_slice(name), tensor)
        tensors = safetensors.torch.load_file(path)
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
        return parse(tensors)

    most = HEADER_BYTES + sum(tensor.nbytes for tensor in expected.values())
    return read_file(root, location, most, read)


def load_trunk(root: Location, location: Location, most: int) -> dict[str, torch.Tensor]:
    """Read a safetensors file of weights, all of them float32.

    Raises:
        ModelError: if it is missing, too large or something else.
    """

    def read(path: Path) -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no mapping, and can't be iterated over
            kinds = {file.get_slice(name).get_dtype() for name in names}
        if kinds != {"F32"}:
            raise ModelError(f"weights are float32, and these {', '.join(sorted(kinds))}")
        return safetensors.torch.load_file(path)

    return read_file(root, location, most, read)


def _check_kind(name: str, found: Any, expected: torch.Tensor) -> None:
    is_ = found.get_dtype(), found.get_shape()
    should_be = _DTYPES[expected.dtype], list(expected.shape)
    if is_ != should_be:
        raise ModelError(f"{name} is {is_[0]} {is_[1]}, not {should_be[0]} {should_be[1]}")


def _check_names(found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, others = sorted(expected - found), sorted(found - expected)
        raise ModelError(
            f"it is not of this model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(others)} are of something else {[name[:40] for name in others[:3]]}"
        )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises: ModelError if there are NaN or infinite values."""
    # the extremes are NaN if anything is; a mask would take memory
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise ModelError(f"{name} has NaN or infinite values")


def read_table(
    root: Location,
    location: Location,
    columns: Mapping[str, pa.DataType],
    rows: range,
    *,
    parse: Callable[[pa.Table], T] = lambda table: table,
    most_bytes: int | None = None,
) -> T:
    """Parse a Parquet file that holds `columns`, without nulls.

    Args:
        rows: how many there may be.
        most_bytes: the file may hold other columns as well, with those of at most so many bytes.

    Raises:
        ModelError: if it is missing, holds something else, or `parse` refuses it.
    """
    most = most_bytes or HEADER_BYTES + 16 * len(columns) * rows[-1]

    def read(path: Path) -> T:
        with pq.ParquetFile(path) as file:
            _check_parquet(file, columns, rows, most, has_others=most_bytes is not None)
            table = file.read()
        for name in columns:
            if table[name].null_count:
                raise ModelError(f"{name!r} has nulls")
        return parse(table)

    return read_file(root, location, most, read)


def _check_parquet(
    file: pq.ParquetFile,
    columns: Mapping[str, pa.DataType],
    rows: range,
    most: int,
    *,
    has_others: bool,
) -> None:
    metadata, schema = file.metadata, file.schema_arrow
    if metadata.num_rows not in rows:
        raise ModelError(f"it has {metadata.num_rows} rows, not {rows[0]} to {rows[-1]}")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ModelError("it contradicts itself about its rows")
    if sum(group.total_byte_size for group in groups) > most:
        raise ModelError(f"its columns have more than {most} bytes")
    names = schema.names
    for name, kind in columns.items():
        if names.count(name) != 1 or schema.field(name).type != kind:
            raise ModelError(f"it has no column {name!r} of type {kind}")
    if not has_others and len(names) != len(columns):
        raise ModelError(f"it has other columns than {', '.join(columns)}")
