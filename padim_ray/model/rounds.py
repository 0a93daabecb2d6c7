"""Rounds of a fit: how far it got, so that a killed one goes on from there.

versions/000003/
  job.json, listed.parquet            what the fit was begun with
  rounds/000002.json                  how far it got; written last, so that all it names is there
  rounds/000002.parquet               the round's failed images
  rounds/000002/moments-….safetensors the group that the round ended in, so far
  groups/…                            the groups that were finished until then
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from padim_ray.model.files import understood
from padim_ray.model.model_json import MOST_IMAGES, GroupEntry
from padim_ray.storage.fail_points import kill_at
from padim_ray.storage.json_fields import mapping, parse_json, read_fields, show, text, whole
from padim_ray.storage.location import Location, list_numbers, numbered_file


@dataclass(frozen=True)
class PartialGroup:
    """A group that a round ended in: `images` of it are in the moments so far, `failed` aren't."""

    group: str
    images: int
    failed: int


@dataclass(frozen=True)
class Round:
    """The first `rows` images of the manifest: every one is in the moments, or has failed.

    `groups`: those that are finished. `partial`: the one that isn't.
    """

    number: int = 0
    rows: int = 0
    groups: Mapping[str, GroupEntry] = field(default_factory=dict)
    partial: PartialGroup | None = None

    def moments(self, version: Location, shard: int, shards: int) -> Location:
        """Where a state shard of the unfinished group is."""
        name = f"moments-{shard:05d}-of-{shards:05d}.safetensors"
        return version / f"rounds/{self.number:06d}/{name}"

    def commit(self, version: Location, failures: Mapping[str, str]) -> None:
        """Publish the round, whose moments are written, and drop the one before.

        Args:
            version: the directory of the version that is being fitted.
            failures: errors by uri, of this round.
        """
        table = pa.table(
            {
                "uri": pa.array(failures.keys(), pa.string()),
                "error": pa.array(failures.values(), pa.string()),
            }
        )
        (version / f"rounds/{self.number:06d}.parquet").write_table(table)
        kill_at("fit:round-data-written")
        _marker(version, self.number).write(json.dumps(asdict(self), indent=1).encode())
        kill_at("fit:round-committed")
        (version / f"rounds/{self.number - 1:06d}").remove_all()

    @classmethod
    def latest(cls, version: Location) -> "Round":
        """The last round that was committed; an empty one before the first.

        Raises:
            ModelError: if it is damaged.
        """
        numbers = list_numbers(version / "rounds")
        if not numbers:
            return cls()
        marker = _marker(version, numbers[-1])
        with understood(marker):
            return read_fields(cls, parse_json(marker.read()), "it", _ROUND)

    def read_failures(self, version: Location) -> dict[str, str]:
        """Errors by uri, of this round and all before."""
        failures: dict[str, str] = {}
        for number in range(1, self.number + 1):
            with (version / f"rounds/{number:06d}.parquet").as_local_file() as path:
                table = pq.read_table(path)
            failures.update(zip(table["uri"].to_pylist(), table["error"].to_pylist(), strict=True))
        return failures


def _groups(value: Any, where: str) -> dict[str, GroupEntry]:
    entries = mapping(value, where).items()
    return {name: GroupEntry.from_json(entry, f"group {show(name)}") for name, entry in entries}


def _partial(value: Any, where: str) -> PartialGroup | None:
    return None if value is None else read_fields(PartialGroup, value, where, _PARTIAL)


_count = whole(0, MOST_IMAGES)
_ROUND = {
    "number": whole(1, MOST_IMAGES),
    "rows": _count,
    "groups": _groups,
    "partial": _partial,
}
_PARTIAL = {"group": text(".*"), "images": _count, "failed": _count}


def remove_rounds(version: Location) -> None:
    """Remove what isn't needed any more when the version is published."""
    (version / "rounds").remove_all()


def _marker(version: Location, number: int) -> Location:
    return numbered_file(version / "rounds", number)
