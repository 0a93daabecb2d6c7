"""A model on storage: numbered versions that never change, and a pointer to the current one.

MODEL/
  CURRENT                                    names the version; replaced atomically, last
  trunks/<sha256>.safetensors                the trunk's weights, shared by the versions
  versions/000003/
    model.json                               format version, spec, groups
    manifest.parquet                         every image that the model was given, failed ones too
    groups/<group>/moments-00000-of-00012.safetensors    exact state, to update from
    groups/<group>/gaussian-00000-of-00012.safetensors   mean and whitening, all that scoring loads
    groups/<group>/calibration.parquet       leave-one-out scores, ascending
    groups/<group>/pixels.parquet            histogram of their anomaly maps' values

A group's state is sharded by runs of coarsest cells, so that no process has to hold all of it to
merge, factorise or write it.
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
SHARD_BYTES = 64 * 2**20  # of a group's unpacked float32 state


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


def _calibration_locations(root: Location, number: int, group: str) -> tuple[Location, Location]:
    directory = _group(root, number, group)
    return directory / "calibration.parquet", directory / "pixels.parquet"


def shard_location(
    root: Location, number: int, group: str, kind: str, index: int, count: int
) -> Location:
    """Where shard `index` of `count` of a group's `kind` ("moments" or "gaussian") is."""
    return _group(root, number, group) / f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def version_location(root: Location, number: int) -> Location:
    """The directory of a version."""
    return root / f"versions/{number:06d}"


def _group(root: Location, number: int, group: str) -> Location:
    return version_location(root, number) / "groups" / safe_segment(group)


def _trunk(root: Location, sha256: str) -> Location:
    return root / f"trunks/{sha256}.safetensors"


def state_shards(spec: ModelSpec) -> list[tuple[int, int]]:
    """The runs of coarsest cells in which a group's state is stored, merged and factorised."""
    parts = -(-4 * spec.grid.state_size // SHARD_BYTES)
    return split_cells(spec.grid.cells[-1], parts)
