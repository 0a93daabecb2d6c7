"""The manifest: the table of a job's images, read from Parquet or listed by a URI template.

Columns: `uri`, `group`, one string column per other name that a template captures, `size` (bytes)
and `version_tag` (the store's ETag, or the modification time). Rows are sorted by group and uri.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.errors import NoImages, PadimError
from padim_ray.storage.location import Location

DEFAULT_GROUP = "default"
_RESULT_COLUMNS = """
    uri size version_tag status error score p_value threshold is_anomalous regions heatmap_uri
    map_uri width height model_version scored_at shard shard_images image distances
    leave_one_out_score mask_uri fetch_uri fetch_mask_uri actor_id loaded_groups
"""
RESERVED_COLUMNS = frozenset(_RESULT_COLUMNS.split())
"""Columns of the results, which a template can't capture."""
_ALLOWED = frozenset({"uri", "size", "version_tag", "mask_uri"})  # reserved, but kept if given


NO_IMAGES = pa.table(
    {
        **{name: pa.array([], pa.string()) for name in ("uri", "group", "version_tag")},
        "size": pa.array([], pa.int64()),
    }
)
"""An empty manifest."""


def read_manifest(location: Location) -> pa.Table:
    """Read a manifest from a Parquet file. Only the column `uri` is required.

    Raises:
        PadimError: if the file is missing, not Parquet or empty, if a uri or group is missing, if a
            column has a wrong type, or if an image is listed twice.
    """
    with manifest_errors(location), location.as_local_file() as path:
        table = pq.read_table(path)
    check_manifest(table.column_names, table.num_rows, location)
    table = complete_manifest(table, location)
    if (
        pc.any(pc.equal(table["uri"], "")).as_py()
        or table["uri"].null_count
        or table["group"].null_count
    ):
        raise PadimError(f"The manifest {location.uri} has a row without a uri or without a group.")
    table = normalise_uris(table, "uri")
    counts = table["uri"].value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise PadimError(
            f"The manifest {location.uri} names images more than once, "
            f"among them {repeated[0]['values'].as_py()}."
        )
    return sort_images(table)


@contextmanager
def manifest_errors(location: Location) -> Iterator[None]:
    """Explain errors of reading a manifest inside the block.

    Raises:
        PadimError: if the manifest is missing, or not Parquet.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise PadimError(f"There is no manifest at {location.uri}.") from error
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise PadimError(f"The manifest {location.uri} is not a Parquet file: {reason}.") from error


def check_manifest(columns: Sequence[str], rows: int, location: Location) -> None:
    """Check that a manifest lists images.

    Raises:
        PadimError: if it has no column `uri`.
        NoImages: if it has no rows.
    """
    if "uri" not in columns:
        raise PadimError(f"The manifest {location.uri} has no column 'uri'.")
    if not rows:
        raise NoImages(f"No image matched: the manifest {location.uri} is empty.")


def complete_manifest(table: pa.Table, location: Location) -> pa.Table:
    """Give a manifest all of its columns, cast or with default values.

    Other columns are kept, except those of a results table: results can be a manifest again.

    Raises:
        PadimError: if a column can't be cast.
    """
    for name, kind, default in (
        ("uri", pa.string(), None),
        ("group", pa.string(), DEFAULT_GROUP),
        ("size", pa.int64(), None),
        ("version_tag", pa.string(), None),
    ):
        if name in table.column_names:
            table = cast_column(table, name, kind, location)
        else:
            table = table.append_column(name, pa.array([default] * table.num_rows, kind))
    return table.drop_columns(sorted(set(table.column_names) & (RESERVED_COLUMNS - _ALLOWED)))


def cast_column(table: pa.Table, name: str, kind: pa.DataType, location: Location) -> pa.Table:
    """Cast a manifest's column.

    Raises:
        PadimError: if that is impossible.
    """
    try:
        column = table[name].cast(kind)
    except pa.ArrowException as error:
        raise PadimError(
            f"The manifest {location.uri} has a column {name!r} that is not {kind}: {error}"
        ) from error
    return table.set_column(table.column_names.index(name), name, column)


def normalise_uris(table: pa.Table, name: str) -> pa.Table:
    """Give each file in a column one spelling; empty becomes null.

    Raises:
        PadimError: if no file system serves a URI's scheme.
    """
    uris = [_normalised(uri) if uri else None for uri in table[name].to_pylist()]
    for scheme in {uri.partition("://")[0] for uri in uris if uri and "://" in uri}:
        Location.of(f"{scheme}://bucket")
    return table.set_column(table.column_names.index(name), name, pa.array(uris, pa.string()))


def _normalised(uri: str) -> str:
    """Make a local path absolute, because workers may run in another directory."""
    is_remote = "://" in uri and not uri.startswith("file://")
    return uri if is_remote else Location.of(uri).uri


def sort_images(table: pa.Table) -> pa.Table:
    """Sort a manifest by group and uri."""
    return table.sort_by([("group", "ascending"), ("uri", "ascending")])


def group_counts(manifest: pa.Table) -> dict[str, int]:
    """Number of images in each group, sorted by name."""
    counts = manifest["group"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: e["values"])}
