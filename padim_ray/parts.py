"""The results of a scoring run on storage: one Parquet file for each shard of the manifest."""

import re

from padim_ray.storage import Location

PART = "results/part-{:06d}.parquet"
_NAME = re.compile(r"part-\d{6,}\.parquet")


def list_parts(root: Location) -> list[Location]:
    """A run's results files, in their order; not what a killed task left half-written."""
    return [
        file
        for file in (root / "results").list_files()
        if _NAME.fullmatch(file.uri.rpartition("/")[2])
    ]
