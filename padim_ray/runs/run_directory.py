"""The directory of a scoring run.

OUT/
  job.json, listed.parquet       the job's record
  results/part-000007.parquet    the rows of one shard; the shard is done when its file is there.
                                 Scoring creates it, drawing heatmaps replaces it, nothing else does
  heatmaps/….png                 named after the images
  maps/….tiff                    anomaly maps, float32, with --maps
  run.json                       counts, settings, verdicts, throughput
  report.html                    the report for people
  _SUCCESS                       empty, and written last: all of the above is complete
  .staging/                      intermediate and temporary files, removed at the end
  .claims/                       which job is writing here, or that none is
"""

import re

from padim_ray.errors import PadimError
from padim_ray.runs.job_record import JOB, LISTED
from padim_ray.storage.location import Location

PART = "results/part-{:06d}.parquet"
COMPLETE = "_SUCCESS"  # as Hadoop and Spark mark it
_NAME = re.compile(r"part-(\d{6,})\.parquet")


def list_parts(root: Location) -> list[Location]:
    """List a run's results files, in order; half-written files of killed tasks are left out."""
    return [file for file in (root / "results").list_files() if _NAME.fullmatch(file.name)]


def part_number(part: Location) -> int:
    """The number of the shard whose rows are in a results file."""
    found = _NAME.fullmatch(part.name)
    assert found, f"{part.uri} is not a results file"
    return int(found[1])


def is_complete(root: Location) -> bool:
    """Whether a run has finished here."""
    return (root / COMPLETE).exists()


def complete(root: Location) -> None:
    """Mark the run as complete, and remove its intermediate files."""
    (root / COMPLETE).write(b"")
    (root / ".staging").remove_all()


def check_empty(root: Location) -> None:
    """Raises: PadimError if there are results without a job's record."""
    if any((root / name).exists() for name in ("results", "run.json")):
        raise PadimError(
            f"{root.uri} holds results without {JOB}, so they can't be continued; choose another "
            "--out, or replace them with --overwrite"
        )


def clear(root: Location) -> None:
    """Delete a run. Its markers go first, so that a half-deleted run isn't taken for one."""
    for name in (
        *(COMPLETE, JOB, LISTED, "run.json", "results", "heatmaps", "maps", ".staging"),
        *("report.html", "metrics.json", "metrics.parquet", "metrics.md", "curves"),
    ):
        (root / name).remove_all()
