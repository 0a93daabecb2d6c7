"""The directory of a scoring run.

OUT/
  job.json, listed.parquet       what the run was begun with
  results/part-000007.parquet    the rows of one shard of the manifest; with it, it is done
  heatmaps/….png                 named after the image
  maps/….tiff                    raw anomaly maps, float32, if asked for
  run.json                       counts, settings, verdicts, throughput
  report.html                    what people look at
  _SUCCESS                       empty; says that all of the above is there; written last
  .staging/                      what the run needs until then
  .claims/                       who is writing here
"""

import re

from padim_ray.errors import PadimError
from padim_ray.runs.job_record import JOB, LISTED
from padim_ray.storage.location import Location

PART = "results/part-{:06d}.parquet"
COMPLETE = "_SUCCESS"  # as Hadoop and Spark mark it
_NAME = re.compile(r"part-(\d{6,})\.parquet")


def list_parts(root: Location) -> list[Location]:
    """A run's results files, in their order; not what a killed task left half-written."""
    return [file for file in (root / "results").list_files() if _NAME.fullmatch(file.name)]


def part_number(part: Location) -> int:
    """The shard whose rows a results file holds."""
    found = _NAME.fullmatch(part.name)
    assert found, f"{part.uri} is no results file"
    return int(found[1])


def is_complete(root: Location) -> bool:
    """Whether a run ended here."""
    return (root / COMPLETE).exists()


def complete(root: Location) -> None:
    """Say that all is there, and remove what was kept to get there."""
    (root / COMPLETE).write(b"")
    (root / ".staging").remove_all()


def check_empty(root: Location) -> None:
    """Raises: PadimError if there are results of which nothing tells how they came about."""
    if any((root / name).exists() for name in ("results", "run.json")):
        raise PadimError(
            f"{root.uri} holds results without {JOB}, so they can't be continued; choose another "
            "--out, or replace them with --overwrite"
        )


def clear(root: Location) -> None:
    """Remove all of a run; first what says that there is one."""
    for name in (
        *(COMPLETE, JOB, LISTED, "run.json", "results", "heatmaps", "maps", ".staging"),
        *("report.html", "metrics.json", "metrics.parquet", "metrics.md", "curves"),
    ):
        (root / name).remove_all()
