"""Survey an archive: its groups, their sizes in images and bytes, and a sample of rows.

A manifest may be an inventory of a hundred million rows. So only its columns `group` and `size` are
read completely, batch by batch; the other columns are read from a single place.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.images.manifest import (
    DEFAULT_GROUP,
    canonical_uris,
    check_manifest,
    check_stores,
    complete_manifest,
    group_counts,
    manifest_errors,
)
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.storage.location import Location

BATCH_ROWS = 2**20
SAMPLED_ROWS = 10_000  # rows from which the mean size of a row is estimated


@dataclass(frozen=True)
class Survey:
    """An archive as it is listed.

    Attributes:
        groups: number of images per group, in the manifest's order.
        bytes: total size of the images whose size is listed.
        sized: number of images whose size is listed.
        manifest_bytes: size of the list in memory.
        sample: rows from all over the list.
    """

    groups: dict[str, int]
    bytes: int
    sized: int
    manifest_bytes: int
    sample: pa.Table


def survey(options: PlanOptions) -> Survey:
    """List the images of --images, or survey the --manifest.

    Raises:
        PadimError: if there are no images, or they can't be listed.
    """
    if options.manifest is not None:
        return survey_manifest(
            Location.of(options.manifest, options.storage_options), options.sample
        )
    assert options.images is not None
    table = list_images(UriTemplate.parse(options.images, options.storage_options))
    sizes = table["size"]
    return Survey(
        groups=group_counts(table),
        bytes=pc.sum(sizes).as_py() or 0,
        sized=len(sizes) - sizes.null_count,
        manifest_bytes=table.nbytes,
        sample=_spread(table, options.sample),
    )


def survey_manifest(location: Location, sample: int) -> Survey:
    """Survey a manifest. Duplicate URIs aren't detected here, but by the jobs.

    Args:
        location: of the Parquet file.
        sample: number of rows to return as a sample.

    Raises:
        PadimError: if the file doesn't exist, or isn't a manifest.
    """
    groups: Counter[str | None] = Counter()
    size = sized = 0
    with (
        manifest_errors(location),
        location.open_parts() as file,
        pq.ParquetFile(file, pre_buffer=True) as parquet,
    ):
        columns, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
        check_manifest(columns, rows, location)
        wanted = [name for name in ("group", "size") if name in columns]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=wanted) if wanted else []:
            part = complete_manifest(
                pa.table(batch).append_column("uri", _no_uris(batch)), location
            )
            for entry in part["group"].value_counts().to_pylist():
                groups[entry["values"]] += entry["counts"]
            size += pc.sum(part["size"]).as_py() or 0
            sized += part.num_rows - part["size"].null_count
        middle = parquet.num_row_groups // 2
        middle_rows = next(parquet.iter_batches(SAMPLED_ROWS, row_groups=[middle]))
    kept = canonical_uris(complete_manifest(pa.table(middle_rows), location), "uri")
    check_stores(kept["uri"], location)
    if not wanted:
        groups[DEFAULT_GROUP] = rows
    return Survey(
        groups=dict(sorted((str(group), count) for group, count in groups.items())),
        bytes=size,
        sized=sized,
        manifest_bytes=round(kept.nbytes / kept.num_rows * rows),
        sample=_spread(kept, sample),
    )


def _no_uris(batch: pa.RecordBatch) -> pa.Array:
    return pa.nulls(batch.num_rows, pa.string())


def _spread(table: pa.Table, count: int) -> pa.Table:
    """At most `count` evenly spaced rows of a table."""
    count = min(count, table.num_rows)
    return table.take(np.linspace(0, table.num_rows - 1, count).round().astype(int))
