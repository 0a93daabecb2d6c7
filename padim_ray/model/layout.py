"""A model on storage: numbered versions that never change, and a pointer to the current one.

MODEL/
  CURRENT                                    names the current version; replaced last, atomically
  .claims/, .readers/                        which job writes to the model, and which ones read it
  trunks/<sha256>.safetensors                the trunk's weights, shared by the versions
  versions/000003/
    model.json                               format version, spec, groups
    manifest-<id>.parquet                    every image that the model was given, also failed ones;
                                             model.json names it (before format 3: manifest.parquet)
    groups/<group>/moments-00000-of-00012.safetensors    exact statistics, to update the model from
    groups/<group>/gaussian-00000-of-00012.safetensors   the fitted density; scoring loads only this
    groups/<group>/calibration.parquet       leave-one-out scores, ascending
    groups/<group>/pixels.parquet            histogram of the values of their anomaly maps

A group's statistics are sharded by runs of coarsest cells, so that no process has to hold all of
them to merge them, to fit the density or to write files. A density that is the same at all cells
has one file.
"""

import re
from pathlib import Path

from padim_ray.errors import ModelError
from padim_ray.features.grid import split_cells
from padim_ray.model.spec import ModelSpec
from padim_ray.storage.json_fields import show
from padim_ray.storage.location import Location, safe_segment
from padim_ray.storage.untrusted import parse_file

MODEL = "model.json"
SHARD_BYTES = 64 * 2**20  # of a group's unpacked statistics


def split_name(name: str) -> tuple[str, int | None]:
    """Split `URI@3` into URI and version number; the number is None if the name has none."""
    if found := re.fullmatch(r"(.+)@([0-9]{1,9})", name, re.DOTALL):
        return found[1], int(found[2])
    return name, None


def check_number(root: Location, number: int | None = None) -> int:
    """Check that a version is published, and return its number.

    Args:
        root: the model's directory.
        number: the version. Default: the current one.

    Raises:
        ModelError: if there is no such version.
    """
    current = current_number(root)
    if current is None:
        raise ModelError(f"There is no model at {root.uri}")
    if number is None or number == current:
        return current
    if number < 1 or not is_published(root, number):
        known = ", ".join(map(str, published_numbers(root)))
        raise ModelError(f"{root.uri} has no version {number}; it has {known}")
    return number


def published_numbers(root: Location) -> list[int]:
    """The published versions, ascending; after a roll-back, some are later than the current one."""
    return [number for number in version_numbers(root) if is_published(root, number)]


def version_numbers(root: Location) -> list[int]:
    """The versions that have a directory, ascending, including unfinished and abandoned ones."""
    names = (root / "versions").list_directories()
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{6,9}", name))


def next_number(root: Location) -> int:
    """The number of the version that a fit writes next, or is writing: the last published + 1."""
    numbers = reversed(version_numbers(root))
    return next((number for number in numbers if is_published(root, number)), 0) + 1


def current_number(root: Location) -> int | None:
    """The number of the current version; None if there is no model.

    Raises:
        ModelError: if CURRENT holds no version number.
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
    """Whether a version is complete, current or not."""
    return (version_location(root, number) / MODEL).exists()


def calibration_locations(root: Location, number: int, group: str) -> tuple[Location, Location]:
    """The files of a group's leave-one-out scores, and of its histogram of map values."""
    directory = group_location(root, number, group)
    return directory / "calibration.parquet", directory / "pixels.parquet"


def shard_location(
    root: Location, number: int, group: str, kind: str, index: int, count: int
) -> Location:
    """The file of shard `index` of `count` of a group's statistics or density of this kind."""
    return group_location(root, number, group) / f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def version_location(root: Location, number: int) -> Location:
    """The directory of a version."""
    return root / f"versions/{number:06d}"


def group_location(root: Location, number: int, group: str) -> Location:
    """The directory of a group's files."""
    return version_location(root, number) / "groups" / safe_segment(group)


def trunk_location(root: Location, sha256: str) -> Location:
    """The file of the trunk's weights with that hash."""
    return root / f"trunks/{sha256}.safetensors"


def state_shards(spec: ModelSpec) -> list[tuple[int, int]]:
    """The runs of coarsest cells in which a group's statistics are stored, merged and fitted."""
    parts = -(-spec.density.state_bytes(spec.grid) // SHARD_BYTES)
    return split_cells(spec.grid.cells[-1], parts)
