"""Rounds: the progress of a fit, from which a killed fit continues.

versions/000003/
  job.json, listed.parquet            the fit's options and its list of images
  rounds/000002.json                  the progress; written after all files that it refers to
  rounds/000002.parquet               images that failed in this round; those that failed before
                                      and were read now have an empty error
  rounds/000002/<kind>-….safetensors  statistics of the unfinished group, so far
  groups/…                            the groups that are finished
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from padim_ray.model.model_json import MAX_BYTES, MAX_IMAGES, GroupEntry
from padim_ray.storage.fail_points import kill_at
from padim_ray.storage.json_fields import (
    flag,
    mapping,
    parse_json,
    read_fields,
    show,
    text,
    whole,
)
from padim_ray.storage.location import Location, list_numbers, numbered_file
from padim_ray.storage.spelling import canonical_uri
from padim_ray.storage.untrusted import MAX_ROWS, MAX_TABLE_BYTES, read_file, read_table


@dataclass(frozen=True)
class PartialGroup:
    """The group that was unfinished at the end of a round.

    Attributes:
        group: its name.
        images: the number of its images in the statistics so far.
        failed: the number of its images that failed so far.
        has_base: whether the statistics have the images of the base version as well.
    """

    group: str
    images: int
    failed: int
    has_base: bool = False


@dataclass(frozen=True)
class Round:
    """The progress of a fit at the end of a round.

    Attributes:
        number: the round's number, from 1; 0 before the first.
        rows: the first `rows` images of the manifest were added or failed.
        groups: the finished groups.
        partial: the unfinished group.
    """

    number: int = 0
    rows: int = 0
    groups: Mapping[str, GroupEntry] = field(default_factory=dict)
    partial: PartialGroup | None = None

    def statistics_file(self, version: Location, kind: str, shard: int, shards: int) -> Location:
        """The file of a shard of the unfinished group's statistics, of that kind."""
        name = f"{kind}-{shard:05d}-of-{shards:05d}.safetensors"
        return version / f"rounds/{self.number:06d}/{name}"

    def commit(self, version: Location, failures: Mapping[str, str | None]) -> None:
        """Commit the round, whose statistics are written, and delete those of the one before.

        Args:
            version: directory of the version that is being fitted.
            failures: errors of this round's failed images, by URI; None for an image that failed
                in an earlier round and was read in this one.
        """
        table = pa.table(
            {
                "uri": pa.array(failures.keys(), pa.string()),
                "error": pa.array([error or "" for error in failures.values()], pa.string()),
            }
        )
        (version / f"rounds/{self.number:06d}.parquet").write_table(table)
        kill_at("fit:round-data-written")
        _marker(version, self.number).write(json.dumps(asdict(self), indent=1).encode())
        kill_at("fit:round-committed")
        (version / f"rounds/{self.number - 1:06d}").remove_all()

    @classmethod
    def latest(cls, version: Location, root: Location) -> "Round":
        """The last committed round; an empty one if there is none.

        Args:
            version: directory of the version that is being fitted.
            root: the model's directory.

        Raises:
            ModelError: if its file is damaged.
        """
        numbers = list_numbers(version / "rounds")
        if not numbers:
            return cls()
        return read_file(
            *(root, _marker(version, numbers[-1]), MAX_BYTES),
            lambda path: read_fields(cls, parse_json(path.read_bytes()), "it", _ROUND),
        )

    def read_failures(self, version: Location, root: Location) -> dict[str, str]:
        """The errors of failed images of this round and all before, by URI.

        Args:
            version: directory of the version that is being fitted.
            root: the model's directory.

        Raises:
            ModelError: if a file is missing or damaged.
        """
        failures: dict[str, str] = {}
        for number in range(1, self.number + 1):
            table: pa.Table = read_table(
                *(root, version / f"rounds/{number:06d}.parquet"),
                {"uri": pa.string(), "error": pa.string()},
                range(MAX_ROWS),
                max_bytes=MAX_TABLE_BYTES,
            )
            uris = map(canonical_uri, table["uri"].to_pylist())  # an older padim-ray's weren't
            failures.update(zip(uris, table["error"].to_pylist(), strict=True))
        return {uri: error for uri, error in failures.items() if error}


def _groups(value: Any, where: str) -> dict[str, GroupEntry]:
    entries = mapping(value, where).items()
    return {name: GroupEntry.from_json(entry, f"group {show(name)}") for name, entry in entries}


def _partial(value: Any, where: str) -> PartialGroup | None:
    return None if value is None else read_fields(PartialGroup, value, where, _PARTIAL)


_count = whole(0, MAX_IMAGES)
_ROUND = {
    "number": whole(1, MAX_IMAGES),
    "rows": _count,
    "groups": _groups,
    "partial": _partial,
}
_PARTIAL = {"group": text(".*"), "images": _count, "failed": _count, "has_base": flag}


def remove_rounds(version: Location) -> None:
    """Delete all rounds of a version, which has been published."""
    (version / "rounds").remove_all()


def _marker(version: Location, number: int) -> Location:
    return numbered_file(version / "rounds", number)
