"""What an archive is: how many images in which groups, and how large; with a sample to look at.

A manifest may be an inventory of a hundred million rows: of its columns only `group` and `size` are
read whole, a piece at a time, and the others in one place.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.images.manifest import (
    DEFAULT_GROUP,
    check_manifest,
    complete_manifest,
    group_counts,
    manifest_errors,
    normalise_uris,
)
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.storage.location import Location

ROWS_TOGETHER = 2**20  # read of a manifest at once
SAMPLED_ROWS = 10_000  # which tell the width of all


@dataclass(frozen=True)
class Survey:
    """An archive as it is listed.

    `groups`: images of each, in the manifest's order. `bytes`: of the images whose size is listed,
    `sized`: how many these are. `manifest_bytes`: of the list in memory. `sample`: some rows.
    """

    groups: dict[str, int]
    bytes: int
    sized: int
    manifest_bytes: int
    sample: pa.Table


def survey(options: PlanOptions) -> Survey:
    """List the images, or read what matters of a manifest.

    Raises:
        PadimError: if there is nothing to read, or it can't be read.
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
    """Read what matters of a Parquet file.

    That no image is named twice isn't checked: a job does.

    Args:
        sample: how many rows to return.

    Raises:
        PadimError: if it isn't there, or isn't a manifest.
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
        for batch in parquet.iter_batches(ROWS_TOGETHER, columns=wanted) if wanted else []:
            part = complete_manifest(
                pa.table(batch).append_column("uri", _no_uris(batch)), location
            )
            for entry in part["group"].value_counts().to_pylist():
                groups[entry["values"]] += entry["counts"]
            size += pc.sum(part["size"]).as_py() or 0
            sized += part.num_rows - part["size"].null_count
        middle = parquet.num_row_groups // 2
        some = next(parquet.iter_batches(SAMPLED_ROWS, row_groups=[middle]))
    kept = normalise_uris(complete_manifest(pa.table(some), location), "uri")
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
    """Rows from all over the table."""
    count = min(count, table.num_rows)
    return table.take(np.linspace(0, table.num_rows - 1, count).round().astype(int))
