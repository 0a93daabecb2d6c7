"""Read files that may be damaged or hostile, such as those of a model.

A file's place, size and header are checked before its content is read. Any fault raises a
ModelError that names the file. No code from a file is run, and a small file can't ask for much more
memory than a valid one of its size needs.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import ArrowException
from safetensors import SafetensorError

from padim_ray.errors import ModelError
from padim_ray.storage.location import Location

HEADER_BYTES = 2**20  # for the header of a safetensors file, or Parquet's metadata
MAX_TABLE_BYTES = 16 * 2**30  # of a list of images
MAX_ROWS = 10**10
MAX_EXPANSION = 1000  # decoded bytes per byte of a file; a list of images has up to 300
FREE_BYTES = 64 * 2**20  # the least that a table may decode to, however small its file
T = TypeVar("T")


def read_file(root: Location, location: Location, max_bytes: int, parse: Callable[[Path], T]) -> T:
    """As `parse_file`, for a file that must exist.

    Raises:
        ModelError: if it is missing or refused.
    """
    try:
        return parse_file(root, location, max_bytes, parse)
    except FileNotFoundError as error:
        raise ModelError(f"{root.uri} is incomplete: {location.uri} is missing") from error


def parse_file(root: Location, location: Location, max_bytes: int, parse: Callable[[Path], T]) -> T:
    """Parse a file below the directory `root`.

    Args:
        root: the directory, such as a model's.
        location: the file.
        max_bytes: a larger file is refused.
        parse: parses a local copy of the file.

    Raises:
        FileNotFoundError: if it is missing.
        ModelError: if it is too large, outside the directory, or `parse` refuses it.
    """
    with naming_file(location):
        check_file(root, location, max_bytes)
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


def check_file(root: Location, location: Location, max_bytes: int) -> None:
    """Check that a file is a regular one, inside the directory `root`, and not too large.

    Raises:
        FileNotFoundError: if it is missing.
        ModelError: if it is not.
    """
    size: int | None
    if location.is_local:
        file = os.stat(location.uri)
        if not stat.S_ISREG(file.st_mode):
            raise ModelError("it is not a regular file")
        inside, real = os.path.realpath(root.uri), os.path.realpath(location.uri)
        if os.path.commonpath([inside, real]) != inside:
            raise ModelError(f"it is a link that leads out of {root.uri}")
        size = file.st_size
    else:
        size = location.size()
    if size is None or size > max_bytes:
        raise ModelError(f"it has {size} bytes, and not at most {max_bytes}")


def read_table(
    root: Location,
    location: Location,
    columns: Mapping[str, pa.DataType],
    rows: range,
    *,
    parse: Callable[[pa.Table], T] = lambda table: table,
    max_bytes: int | None = None,
    optional: Mapping[str, pa.DataType] | None = None,
) -> T:
    """Parse a Parquet file that must exist.

    Args:
        root: the directory, such as a model's.
        location: the file.
        columns: the columns that it must have, by name, without nulls.
        rows: the numbers of rows that it may have.
        parse: makes something of the table. Default: returns the table itself.
        max_bytes: maximum size of the file and its columns; if given, the file may have other
            columns as well. Default: derived from `columns` and `rows`.
        optional: columns of which only the type is given, if they are there.

    Raises:
        ModelError: if the file is missing or different, or `parse` refuses it.
    """
    has_others = max_bytes is not None
    limit = max_bytes or HEADER_BYTES + 16 * len(columns) * rows[-1]

    def read(path: Path) -> T:
        most = min(limit, decoded_limit(path))
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, columns, optional or {}, has_others=has_others)
            check_sizes(file.metadata, rows, most)
        table = _read_parquet(path, most)
        for name in columns:
            if table[name].null_count:
                raise ModelError(f"{name!r} has nulls")
        return parse(table)

    return read_file(root, location, limit, read)


def _check_schema(
    schema: pa.Schema,
    columns: Mapping[str, pa.DataType],
    optional: Mapping[str, pa.DataType],
    *,
    has_others: bool,
) -> None:
    names = schema.names
    for name, kind in {**columns, **optional}.items():
        if name in optional and name not in names:
            continue
        if names.count(name) != 1 or schema.field(name).type != kind:
            raise ModelError(f"it has no column {name!r} of type {kind}")
    if not has_others and len(names) != len(columns):
        raise ModelError(f"it has other columns than {', '.join(columns)}")


def decoded_limit(path: Path) -> int:
    """The most bytes that the columns of a Parquet file may decode to, given its size."""
    return max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)


def check_sizes(metadata: pq.FileMetaData, rows: range, max_bytes: int) -> None:
    """Check what a Parquet file says about its size.

    Raises:
        ModelError: if it has another number of rows, or its columns more than `max_bytes`.
    """
    if metadata.num_rows not in rows:
        raise ModelError(f"it has {metadata.num_rows} rows, not {rows[0]} to {rows[-1]}")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ModelError("it contradicts itself about its rows")
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    # run lengths make few bytes of many values
    size = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)
    if size > max_bytes:
        raise ModelError(f"its columns have more than {max_bytes} bytes")


def _read_parquet(path: Path, max_bytes: int) -> pa.Table:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    batches = decoded_batches(path, max_bytes)
    return pa.Table.from_batches(batches, _flat(schema)).cast(schema)


def decoded_batches(
    path: Path,
    max_bytes: int,
    columns: Sequence[str] | None = None,
    rows: int = 2**17,
) -> Iterator[pa.RecordBatch]:
    """Read a Parquet file in batches. Texts that are stored once and repeated expand only there.

    Args:
        path: the file.
        max_bytes: what all batches together may take.
        columns: the columns to read. Default: all.
        rows: of a batch.

    Raises:
        ModelError: before the batch that takes more than is left of `max_bytes`.
    """
    with pq.ParquetFile(path) as file:
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
        schema = file.schema_arrow
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    size = 0
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for group in range(file.num_row_groups):  # one by one: dictionaries grow within a group
            for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                size += sum(map(_decoded_bytes, batch.columns))
                if size > max_bytes:
                    raise ModelError(f"its columns have more than {max_bytes} bytes")
                yield batch.cast(_flat(pa.schema(map(schema.field, batch.schema.names))))


def _flat(schema: pa.Schema) -> pa.Schema:
    """There is no cast from dictionaries to string views, which Polars writes."""
    for index, column in enumerate(schema):
        if pa.types.is_string_view(column.type):
            schema = schema.set(index, column.with_type(pa.string()))
    return schema


def _decoded_bytes(array: pa.Array) -> int:
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return array.indices.nbytes + (pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_map(kind):
        return array.nbytes + _decoded_bytes(array.keys) + _decoded_bytes(array.items)
    if pa.types.is_nested(kind):
        return array.nbytes + _decoded_bytes(array.flatten())
    return array.nbytes
