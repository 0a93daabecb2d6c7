"""The results of a scoring run on storage: one Parquet file for each shard of the manifest."""

import re

from padim_ray.storage import Location, explained

PART = "results/part-{:06d}.parquet"
_NAME = re.compile(r"part-\d{6,}\.parquet")


def list_parts(root: Location) -> list[Location]:
    """A run's results files, in their order; not what a killed task left half-written."""
    results = root / "results"
    with explained(results.uri, "list"):
        results.fs.invalidate_cache()  # workers may have written since this process last listed
        paths = results.fs.find(results.path)
    return [
        Location(root.uri_of(path), root.options)
        for path in sorted(paths)
        if _NAME.fullmatch(path.rpartition("/")[2])
    ]
