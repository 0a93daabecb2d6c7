"""Open a published version of a model and read its parts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from padim_ray.densities.base import Fitted, Named, State, Statistics
from padim_ray.errors import ModelError
from padim_ray.features.grid import split_cells
from padim_ray.features.weights import StateDict, weights_sha256
from padim_ray.images.manifest import TEXT, restore_manifest
from padim_ray.model.files import load_tensors, load_trunk
from padim_ray.model.layout import (
    MODEL,
    calibration_locations,
    check_number,
    shard_location,
    split_name,
    trunk_location,
    version_location,
)
from padim_ray.model.model_json import (
    MAX_BYTES,
    Description,
    GroupEntry,
    read_description,
)
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.calibration import Calibration, count_pixels, read_scores
from padim_ray.scoring.histogram import BINS
from padim_ray.storage.json_fields import show
from padim_ray.storage.location import Location
from padim_ray.storage.untrusted import MAX_TABLE_BYTES, read_file, read_table

LOADING_THREADS = 2  # two streams from a store are faster than one; more take more memory
MAX_TRUNK_BYTES = 2**30  # of a hostile file
OUTCOMES = {"status": TEXT, "error": TEXT, "leave_one_out_score": pa.float32()}
"""Columns of a manifest that say what became of an image."""
_OPTIONAL = {
    **{name: pa.string() for name in ("version_tag", "status", "error")},
    "size": pa.int64(),
    "leave_one_out_score": pa.float32(),
}
AnyState = TypeVar("AnyState", bound=State)


@dataclass(frozen=True)
class ModelVersion:
    """A published version, and functions to load its parts.

    Attributes:
        root: the model's directory.
        number: the version's number.
        spec: the model's specification.
        groups: its groups by name.
        manifest: name of its manifest's file; empty before it is published.
    """

    root: Location
    number: int
    spec: ModelSpec
    groups: Mapping[str, GroupEntry]
    manifest: str = ""

    @property
    def name(self) -> str:
        """The version's name, as `open_named` takes it."""
        return f"{self.root.uri}@{self.number}"

    def fingerprint(self) -> str:
        """SHA-256 of model.json: differs if another version has taken the number."""
        location = version_location(self.root, self.number) / MODEL
        content = read_file(self.root, location, MAX_BYTES, Path.read_bytes)
        return hashlib.sha256(content).hexdigest()

    def home(self, group: str) -> int:
        """The number of the version whose directory holds a group's files."""
        return self.groups[group].version or self.number

    def statistics_file(self, group: str, shard: int) -> Location:
        """The file of a shard of a group's statistics."""
        kind, shards = self.spec.density.statistics_kind, self.groups[group].shards
        return self._file(group, kind, shard, shards)

    def density_file(self, group: str, shard: int) -> Location:
        """The file of a shard of a group's fitted density."""
        density = self.spec.density
        shards = self.groups[group].shards if density.per_cell else 1
        return self._file(group, density.kind, shard, shards)

    def _file(self, group: str, kind: str, shard: int, shards: int) -> Location:
        return shard_location(self.root, self.home(group), group, kind, shard, shards)

    def load_trunk_weights(self) -> StateDict:
        """Read the trunk's weights; see the function of the same name."""
        return load_trunk_weights(self.root, self.spec.weights_sha256)

    @torch.inference_mode(mode=False)  # the caller may use the tensors in any mode
    def load_statistics(self, group: str, shard: int | None = None) -> Statistics:
        """Load a group's statistics.

        Args:
            group: the group's name.
            shard: load only this shard. Default: all of them.

        Raises:
            ModelError: if a file is missing or invalid.
        """
        density, images = self.spec.density, self.groups[group].images

        def parse(packed: Named) -> Statistics:
            if packed["count"].item() != images:
                raise ModelError(f"it is not of {images} images, as model.json says")
            return density.unpack_statistics(packed)

        def make(device: str) -> Statistics:
            return density.empty(self.spec.grid, device)

        whole = self._load(group, make, self.statistics_file, parse, self._runs(group), shard)
        return density.statistics(images, whole.named)

    @torch.inference_mode(mode=False)
    def load_density(self, group: str, shard: int | None = None) -> Fitted:
        """Load a group's fitted density.

        Args:
            group: the group's name.
            shard: load only this shard. Default: all of them.

        Raises:
            ModelError: if a file is missing or invalid.
        """
        density, runs = self.spec.density, self._runs(group)

        def make(device: str) -> Fitted:
            return density.empty_fitted(self.spec.grid, device)

        if not density.per_cell:
            runs = [(0, self.spec.grid.cells[-1])]
        return self._load(group, make, self.density_file, density.unpack_fitted, runs, shard)

    def _runs(self, group: str) -> list[tuple[int, int]]:
        """The runs of coarsest cells into which a group is sharded."""
        count = self.groups[group].shards
        runs = split_cells(self.spec.grid.cells[-1], count)
        if len(runs) != count:
            raise ModelError(f"{self.root.uri} can't have {count} shards of group {show(group)}")
        return runs

    def _load(
        self,
        group: str,
        make: Callable[[str], AnyState],
        file: Callable[[str, int], Location],
        unpack: Callable[[Named], AnyState],
        runs: Sequence[tuple[int, int]],
        shard: int | None = None,
    ) -> AnyState:
        """Load shards into one state, few at a time, with little more memory than the state's.

        Args:
            group: the group's name.
            make: makes an uninitialised state of all cells on a device.
            file: the file of a group's shard.
            unpack: makes a state of a shard's tensors.
            runs: the coarsest cells of each shard.
            shard: load only this shard.
        """
        like = make("meta")

        def load(index: int) -> AnyState:
            expected = like.cells(*runs[index]).packed()
            return load_tensors(self.root, file(group, index), expected, unpack)

        if shard is not None or len(runs) == 1:
            return load(shard or 0)
        whole = make("cpu")

        def take(index: int) -> None:
            part = load(index).named
            for name, target in whole.cells(*runs[index]).named.items():
                target.copy_(part[name])

        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            list(pool.map(take, range(len(runs))))
        return whole

    def load_calibration(self, group: str) -> Calibration | None:
        """Load a group's calibration; None if it isn't calibrated.

        Raises:
            ModelError: if a file is missing or invalid.
        """
        images = self.groups[group].calibrated
        if not images:
            return None
        height, width = self.spec.preprocessing.size
        scores, pixels = calibration_locations(self.root, self.home(group), group)
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
        """Load the manifest: every image that the model was given, with `status` and `error`.

        Raises:
            ModelError: if it is missing or invalid.
        """
        listed = sum(entry.images + entry.failed for entry in self.groups.values())
        return read_table(
            self.root,
            version_location(self.root, self.number) / self.manifest,
            {"uri": pa.string(), "group": pa.string()},
            range(listed + 1),  # images that were given as tensors aren't listed
            parse=restore_manifest,
            max_bytes=MAX_TABLE_BYTES,
            optional=_OPTIONAL,
        )


def open_version(root: Location, number: int | None = None) -> ModelVersion:
    """Open a published version of a model.

    Args:
        root: the model's directory.
        number: the version. Default: the current one.

    Raises:
        ModelError: if there is no such version, or it is invalid or of another format version.
    """
    found = describe_version(root, number := check_number(root, number))
    return ModelVersion(root, number, found.spec, found.groups, found.manifest)


def open_named(name: str, options: Mapping[str, Any] | None = None) -> ModelVersion:
    """Open a version by its name.

    Args:
        name: the model's URI, such as `s3://models/line7@3`; without `@3` it is the current
            version. If the directory's own name ends like that, add a slash.
        options: fsspec's, for an object store.

    Raises:
        ModelError: as `open_version`.
    """
    uri, number = split_name(name)
    return open_version(Location.of(uri, options), number)


def describe_version(root: Location, number: int) -> Description:
    """Read a published version's model.json.

    Raises:
        ModelError: if it is missing, invalid or of another format version.
    """
    return read_description(root, version_location(root, number) / MODEL)


def load_trunk_weights(root: Location, sha256: str) -> StateDict:
    """Read the trunk's weights with that hash.

    Raises:
        ModelError: if they are missing, invalid, or have another hash.
    """
    location = trunk_location(root, sha256)
    weights = load_trunk(root, location, MAX_TRUNK_BYTES)
    if weights_sha256(weights) != sha256:
        raise ModelError(f"{location.uri} doesn't hold the weights the model was fitted with")
    return weights
