"""A model on storage: numbered versions that never change, and a pointer to the current one.

MODEL/
  CURRENT                                    names the version; replaced atomically, last
  trunks/<sha256>.safetensors                the trunk's weights, shared by the versions
  versions/000003/
    model.json                               format version, spec, groups
    manifest.parquet                         every image that the model was given, failed ones too
    groups/<group>/moments-00000-of-00012.safetensors    exact state, to update from
    groups/<group>/gaussian-00000-of-00012.safetensors   the fitted density, all that scoring loads
    groups/<group>/calibration.parquet       leave-one-out scores, ascending
    groups/<group>/pixels.parquet            histogram of their anomaly maps' values

A group's statistics are sharded by runs of coarsest cells, so that no process has to hold all of
them to merge them, to fit the density and to write both. A density that is the same at all cells
has one file.
"""

import re
from pathlib import Path

from padim_ray.errors import ModelError
from padim_ray.features.grid import split_cells
from padim_ray.model.files import parse_file
from padim_ray.model.spec import ModelSpec
from padim_ray.storage.json_fields import show
from padim_ray.storage.location import Location, safe_segment

MODEL = "model.json"
SHARD_BYTES = 64 * 2**20  # of a group's unpacked statistics


def split_name(name: str) -> tuple[str, int | None]:
    """A model's URI, and the number of the version that its name asks for, if it does."""
    if found := re.fullmatch(r"(.+)@([0-9]{1,9})", name, re.DOTALL):
        return found[1], int(found[2])
    return name, None


def check_number(root: Location, number: int | None = None) -> int:
    """The number of a published version; None stands for the current one.

    Raises:
        ModelError: if there is no such version.
    """
    current = current_number(root)
    if current is None:
        raise ModelError(f"There is no model at {root.uri}")
    if number in (None, current):
        return current
    if number < 1 or not is_published(root, number):
        known = ", ".join(map(str, published_numbers(root)))
        raise ModelError(f"{root.uri} has no version {number}; it has {known}")
    return number


def published_numbers(root: Location) -> list[int]:
    """The versions that are there, ascending: also those that a roll-back left behind."""
    return [number for number in version_numbers(root) if is_published(root, number)]


def version_numbers(root: Location) -> list[int]:
    """The versions that have a directory, ascending: also unfinished and abandoned ones."""
    names = (root / "versions").list_directories()
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{6,9}", name))


def next_number(root: Location) -> int:
    """The version that a fit makes, or has begun to make: no published one has a higher number."""
    numbers = reversed(version_numbers(root))
    return next((number for number in numbers if is_published(root, number)), 0) + 1


def current_number(root: Location) -> int | None:
    """The number that CURRENT names, None where there is no model.

    Raises:
        ModelError: if it names something else.
    """
    location = root / "CURRENT"
    try:
        content = parse_file(root, location, 100, Path.read_bytes)
    except FileNotFoundError:
        return None
    if not re.fullmatch(rb"0*[1-9][0-9]{0,8}\n?", content):
        raise ModelError(f"{location.uri} doesn't name a version: {show(content)}")
    return int(content)


def is_published(root: Location, number: int) -> bool:
    """Whether all of a version is there, be it the current one or not."""
    return (version_location(root, number) / MODEL).exists()


def calibration_locations(root: Location, number: int, group: str) -> tuple[Location, Location]:
    """Where a group's leave-one-out scores and its histogram of map values are."""
    directory = group_location(root, number, group)
    return directory / "calibration.parquet", directory / "pixels.parquet"


def shard_location(
    root: Location, number: int, group: str, kind: str, index: int, count: int
) -> Location:
    """Where shard `index` of `count` of a group's statistics or density is, named by their kind."""
    return group_location(root, number, group) / f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def version_location(root: Location, number: int) -> Location:
    """The directory of a version."""
    return root / f"versions/{number:06d}"


def group_location(root: Location, number: int, group: str) -> Location:
    """The directory of a group's files."""
    return version_location(root, number) / "groups" / safe_segment(group)


def trunk_location(root: Location, sha256: str) -> Location:
    """Where the trunk's weights with that hash are."""
    return root / f"trunks/{sha256}.safetensors"


def state_shards(spec: ModelSpec) -> list[tuple[int, int]]:
    """The runs of coarsest cells in which a group's statistics are stored, merged and fitted."""
    parts = -(-spec.density.state_bytes(spec.grid) // SHARD_BYTES)
    return split_cells(spec.grid.cells[-1], parts)
