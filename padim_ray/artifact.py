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

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError

from padim_ray import __version__, gaussian, moments
from padim_ray.calibration import Calibration, count_pixels, read_scores
from padim_ray.description import (
    FORMAT_VERSION,
    MOST_BYTES,
    Description,
    GroupEntry,
    read_description,
)
from padim_ray.errors import ModelError
from padim_ray.fail_points import kill_at
from padim_ray.fields import show
from padim_ray.gaussian import Gaussian
from padim_ray.histogram import BINS, bin_edges
from padim_ray.model_files import (
    load_tensors,
    load_trunk,
    parse_file,
    read_file,
    read_table,
)
from padim_ray.moments import Moments, empty_moments
from padim_ray.patches import split_cells
from padim_ray.spec import ModelSpec
from padim_ray.storage import Location, safe_segment
from padim_ray.trunk import StateDict, weights_sha256

MODEL = "model.json"
LOADING_THREADS = 2  # a store sends two streams faster than one; more take more memory
SHARD_BYTES = 64 * 2**20  # of a group's unpacked float32 state
# what files may be at the most: hostile ones must not take all memory
MANIFEST_BYTES = 16 * 2**30
TRUNK_BYTES = 2**30

State = TypeVar("State", Moments, Gaussian)


@dataclass(frozen=True)
class ModelVersion:
    """One published version: reads its parts."""

    root: Location
    number: int
    spec: ModelSpec
    groups: Mapping[str, GroupEntry]

    @property
    def name(self) -> str:
        """As `open_named` takes it."""
        return f"{self.root.uri}@{self.number}"

    def fingerprint(self) -> str:
        """SHA-256 of model.json: tells a version from another one that took its number."""
        location = version_location(self.root, self.number) / MODEL
        content = read_file(self.root, location, MOST_BYTES, Path.read_bytes)
        return hashlib.sha256(content).hexdigest()

    def home(self, group: str) -> int:
        """The number of the version whose directory holds a group's files."""
        return self.groups[group].version or self.number

    def file(self, group: str, kind: str, shard: int) -> Location:
        """Where a shard of a group's "moments" or "gaussian" is."""
        shards = self.groups[group].shards
        return shard_location(self.root, self.home(group), group, kind, shard, shards)

    def load_trunk_weights(self) -> StateDict:
        """Read the trunk's weights; ModelError if they aren't those that the model names."""
        return load_trunk_weights(self.root, self.spec.weights_sha256)

    def load_gaussian(self, group: str, shard: int | None = None) -> Gaussian:
        """A group's means and whitening; or those in one of its state shards."""

        def empty(device: str) -> Gaussian:
            like = self._empty_moments(group, device)
            return Gaussian(tuple(mean.float() for mean in like.means), like.scatters)

        return self._load_state(
            group, "gaussian", empty, gaussian.to_tensors, gaussian.from_tensors, shard
        )

    def load_moments(self, group: str, shard: int | None = None) -> Moments:
        """A group's moments; or those in one of its state shards."""

        def parse(tensors: Mapping[str, torch.Tensor]) -> Moments:
            images = self.groups[group].images
            if tensors["count"].item() != images:
                raise ModelError(f"it is not of {images} images, as model.json says")
            return moments.from_tensors(tensors)

        empty = partial(self._empty_moments, group)
        return self._load_state(group, "moments", empty, moments.to_tensors, parse, shard)

    def _empty_moments(self, group: str, device: str) -> Moments:
        grid = self.spec.grid
        state = empty_moments(grid.cells, grid.channels, device=device)
        return replace(state, count=self.groups[group].images)

    @torch.inference_mode(mode=False)  # whatever mode asks for it, any may use what is loaded
    def _load_state(
        self,
        group: str,
        kind: str,
        empty: Callable[[str], State],
        to_tensors: Callable[[State], Mapping[str, torch.Tensor]],
        parse: Callable[[Mapping[str, torch.Tensor]], State],
        shard: int | None = None,
    ) -> State:
        """Read a group's shards into one state, a few at a time: memory for little more than it.

        Args:
            empty: a state of the group's shape, on the device that it is given.
            shard: the only one that is wanted.
        """
        count = self.groups[group].shards
        runs = split_cells(self.spec.grid.cells[-1], count)
        if len(runs) != count:
            raise ModelError(f"{self.root.uri} can't have {count} shards of group {show(group)}")
        like = empty("meta")

        def load(index: int) -> State:
            file = self.file(group, kind, index)
            return load_tensors(self.root, file, to_tensors(like.cells(*runs[index])), parse)

        if shard is not None or count == 1:
            return load(shard or 0)
        whole = empty("cpu")

        def take(index: int) -> None:
            part = load(index)
            for target, source in zip(whole.cells(*runs[index]).tensors, part.tensors, strict=True):
                target.copy_(source)

        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            list(pool.map(take, range(count)))
        return whole

    def load_calibration(self, group: str) -> Calibration | None:
        """Read what leave-one-out gave; None if the group isn't calibrated."""
        images = self.groups[group].calibrated
        if not images:
            return None
        height, width = self.spec.preprocessing.size
        scores, pixels = _calibration_locations(self.root, self.home(group), group)
        return Calibration(
            read_table(
                *(self.root, scores, {"score": pa.float32()}, range(images, images + 1)),
                parse=lambda table: read_scores(table["score"].to_numpy()),
            ),
            read_table(
                *(self.root, pixels, {"value": pa.float32(), "count": pa.int64()}, range(BINS + 1)),
                parse=lambda table: count_pixels(
                    table["value"].to_numpy(), table["count"].to_numpy(), images * height * width
                ),
            ),
        )

    def load_manifest(self) -> pa.Table:
        """Every image that the model's jobs were given, with `status` and `error`."""
        listed = sum(entry.images + entry.failed for entry in self.groups.values())
        return read_table(
            self.root,
            version_location(self.root, self.number) / "manifest.parquet",
            {"uri": pa.string(), "group": pa.string()},
            range(listed + 1),  # fewer, where images came as tensors
            most_bytes=MANIFEST_BYTES,
        )


def open_version(root: Location, number: int | None = None) -> ModelVersion:
    """A version of the model at `root`: the current one, or another that was published.

    Raises:
        ModelError: if there is no such version, one of another format, or one that can't be one.
    """
    spec, groups, *_ = describe_version(root, number := check_number(root, number))
    return ModelVersion(root, number, spec, groups)


def open_named(name: str, options: Mapping[str, Any] | None = None) -> ModelVersion:
    """A version as people name it: `s3://models/line7@3`, or without @3 for the current one.

    A directory whose own name ends like that is named with a slash at its end.

    Raises:
        ModelError: as `open_version`.
    """
    uri, number = split_name(name)
    return open_version(Location.of(uri, options), number)


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


def describe_version(root: Location, number: int) -> Description:
    """What a published version's model.json says; ModelError if it can't be a model's."""
    return read_description(root, version_location(root, number) / MODEL)


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


def save_trunk_weights(root: Location, weights: StateDict) -> None:
    """Store the trunk's weights under their own hash, unless they are there already."""
    location = _trunk(root, weights_sha256(weights))
    if not location.exists():
        save_tensors(location, weights)


def load_trunk_weights(root: Location, sha256: str) -> StateDict:
    """Read the trunk's weights; ModelError if they are missing or have another hash."""
    location = _trunk(root, sha256)
    weights = load_trunk(root, location, TRUNK_BYTES)
    if weights_sha256(weights) != sha256:
        raise ModelError(f"{location.uri} doesn't hold the weights the model was fitted with")
    return weights


def publish(
    root: Location,
    number: int,
    spec: ModelSpec,
    groups: Mapping[str, GroupEntry],
    manifest: pa.Table,
    why: str,
) -> None:
    """Make a version whose group files are already written the current one.

    Args:
        why: what made it, in a line for people.

    Raises:
        ModelError: if somebody else has published this version.
    """
    location = version_location(root, number)
    (location / "manifest.parquet").write_table(manifest)
    kill_at("fit:version-written")
    content = {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "why": why,
        "created_by": secrets.token_hex(8),  # nobody else writes the same
        "versions": {  # padim-ray's own also where it runs from its sources, not installed
            "padim-ray": __version__,
            **{name: package_version(name) for name in ("torch", "torchvision")},
        },
        "spec": spec.to_json(),
        "groups": {name: entry.to_json() for name, entry in sorted(groups.items())},
    }
    try:
        (location / MODEL).create(json.dumps(content, indent=1, ensure_ascii=False).encode())
    except FileExistsError as error:
        raise ModelError(f"{location.uri} was published by another job meanwhile") from error
    kill_at("fit:model-written")
    make_current(root, number)


def is_published(root: Location, number: int) -> bool:
    """Whether all of a version is there, be it the current one or not."""
    return (version_location(root, number) / MODEL).exists()


def make_current(root: Location, number: int) -> None:
    """Have readers open this version from now on."""
    (root / "CURRENT").write(f"{number:06d}\n".encode())


def remove_version(root: Location, number: int, kept_groups: Collection[str] = ()) -> None:
    """Delete a version, but groups whose files others refer to.

    If a kill leaves half of it, it isn't a published one any more.
    """
    location = version_location(root, number)
    (location / MODEL).remove()
    kept = tuple(f"{_group(root, number, group).uri}/" for group in kept_groups)
    if not kept:
        location.remove_all()
    for file in location.list_files() if kept else []:
        if not file.uri.startswith(kept):
            file.remove()


def save_calibration(root: Location, number: int, group: str, calibration: Calibration) -> None:
    """Write a group's calibration."""
    is_there = calibration.pixels > 0
    for location, columns in zip(
        _calibration_locations(root, number, group),
        (
            {"score": calibration.scores},
            {"value": bin_edges()[:-1][is_there], "count": calibration.pixels[is_there]},
        ),
        strict=True,
    ):
        location.write_table(pa.table(columns))


def _calibration_locations(root: Location, number: int, group: str) -> tuple[Location, Location]:
    directory = _group(root, number, group)
    return directory / "calibration.parquet", directory / "pixels.parquet"


def shard_location(
    root: Location, number: int, group: str, kind: str, index: int, count: int
) -> Location:
    """Where shard `index` of `count` of a group's `kind` ("moments" or "gaussian") is."""
    return _group(root, number, group) / f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def save_tensors(location: Location, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as a safetensors file, atomically."""
    with location.replaced_by() as path:
        try:
            safetensors.torch.save_file(dict(tensors), path)
        except SafetensorError as error:  # its name for a full disk, too
            raise OSError(str(error)) from error


def version_location(root: Location, number: int) -> Location:
    """The directory of a version."""
    return root / f"versions/{number:06d}"


def _group(root: Location, number: int, group: str) -> Location:
    return version_location(root, number) / "groups" / safe_segment(group)


def _trunk(root: Location, sha256: str) -> Location:
    return root / f"trunks/{sha256}.safetensors"
