"""The manifest: the table of a job's images, read from Parquet or listed by a URI template.

Columns: `uri`, `group`, one string column per other name that a template captures, `size` (bytes)
and `version_tag` (the store's ETag, or the modification time). Rows are sorted by group and uri.
In memory, strings have 64-bit offsets: the URIs of 40 million images take more than 2 GiB.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.errors import NoImages, PadimError
from padim_ray.storage.location import Location
from padim_ray.storage.spelling import PLAIN, canonical_uri

DEFAULT_GROUP = "default"
TEXT = pa.large_string()
_LONG = {pa.string(): TEXT, pa.binary(): pa.large_binary()}
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
        **{name: pa.array([], TEXT) for name in ("uri", "group", "version_tag")},
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
    check_stores(table["uri"], location)
    table = canonical_uris(table, "uri")
    check_unique(table["uri"], f"The manifest {location.uri}")
    return sort_images(table)


def restore_manifest(table: pa.Table) -> pa.Table:
    """A manifest that a job has stored, as the job had it; its rows keep their order.

    Older versions of padim-ray stored URIs as they were given.
    """
    table = with_long_offsets(table)
    for name in sorted({"uri", "mask_uri"} & set(table.column_names)):
        table = canonical_uris(table, name)
    return table


def with_long_offsets(table: pa.Table) -> pa.Table:
    """A table whose strings have 64-bit offsets."""
    schema = table.schema
    for index, kind in enumerate(schema.types):
        schema = schema.set(index, schema.field(index).with_type(_LONG.get(kind, kind)))
    return table.cast(schema)


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
        ("uri", TEXT, None),
        ("group", TEXT, DEFAULT_GROUP),
        ("size", pa.int64(), None),
        ("version_tag", TEXT, None),
    ):
        if name in table.column_names:
            table = cast_column(table, name, kind, location)
        else:
            table = table.append_column(name, pa.array([default] * table.num_rows, kind))
    unused = sorted(set(table.column_names) & (RESERVED_COLUMNS - _ALLOWED))
    return with_long_offsets(table.drop_columns(unused))


def cast_column(table: pa.Table, name: str, kind: pa.DataType, location: Location) -> pa.Table:
    """Cast a manifest's column.

    Raises:
        PadimError: if that is impossible.
    """
    try:
        column = table[name].cast(kind)
    except pa.ArrowException as error:
        raise PadimError(
            f"The manifest {location.uri} has a column {name!r} that is not "
            f"{'string' if kind == TEXT else kind}: {error}"
        ) from error
    return table.set_column(table.column_names.index(name), name, column)


def check_stores(uris: pa.ChunkedArray, location: Location) -> None:
    """Check that images can be read from all stores that a manifest names.

    Args:
        uris: the images' URIs.
        location: of the manifest, whose options are the images' too.

    Raises:
        PadimError: if no file system serves a URI's scheme, or the options don't fit it.
    """
    found = pc.struct_field(pc.extract_regex(uris, r"^(?P<scheme>[^/:]*)://"), "scheme")
    for scheme in found.unique().drop_null().to_pylist():
        Location.of(f"{scheme}://bucket", location.options)


def check_unique(uris: pa.ChunkedArray, source: str) -> None:
    """Check that a manifest has each image once.

    Args:
        uris: canonical URIs.
        source: of the manifest, as the beginning of the error's sentence.

    Raises:
        PadimError: naming an image that is there more than once.
    """
    if pc.count_distinct(uris, mode="all").as_py() == len(uris):
        return
    counts = uris.value_counts()
    uri = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    raise PadimError(
        f"{source} names images more than once, among them {uri}. Two spellings of one file's URI "
        "count as the same image."
    )


def canonical_uris(table: pa.Table, name: str) -> pa.Table:
    """Give each file in a column one spelling; empty becomes null."""
    if pc.all(pc.match_substring_regex(table[name], PLAIN)).as_py():
        return table
    chunks = [
        pa.array([canonical_uri(uri) if uri else None for uri in chunk.to_pylist()], TEXT)
        for chunk in table[name].chunks
    ]
    index = table.column_names.index(name)
    return table.set_column(index, name, pa.chunked_array(chunks, TEXT))


def sort_images(table: pa.Table) -> pa.Table:
    """Sort a manifest by group and uri."""
    return table.sort_by([("group", "ascending"), ("uri", "ascending")])


def group_counts(manifest: pa.Table) -> dict[str, int]:
    """Number of images in each group, sorted by name."""
    counts = manifest["group"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: e["values"])}
