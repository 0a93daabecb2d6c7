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
from padim_ray.model.files import load_tensors, load_trunk, read_file, read_table
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
    MOST_BYTES,
    Description,
    GroupEntry,
    read_description,
)
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.calibration import Calibration, count_pixels, read_scores
from padim_ray.scoring.histogram import BINS
from padim_ray.storage.json_fields import show
from padim_ray.storage.location import Location

LOADING_THREADS = 2  # a store sends two streams faster than one; more take more memory
# what files may be at the most: hostile ones must not take all memory
MANIFEST_BYTES = 16 * 2**30
TRUNK_BYTES = 2**30
AnyState = TypeVar("AnyState", bound=State)


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

    def statistics_file(self, group: str, shard: int) -> Location:
        """Where a shard of a group's statistics is."""
        kind, shards = self.spec.density.statistics_kind, self.groups[group].shards
        return self._file(group, kind, shard, shards)

    def density_file(self, group: str, shard: int) -> Location:
        """Where a shard of a group's fitted density is."""
        density = self.spec.density
        shards = self.groups[group].shards if density.per_cell else 1
        return self._file(group, density.kind, shard, shards)

    def _file(self, group: str, kind: str, shard: int, shards: int) -> Location:
        return shard_location(self.root, self.home(group), group, kind, shard, shards)

    def load_trunk_weights(self) -> StateDict:
        """Read the trunk's weights; ModelError if they aren't those that the model names."""
        return load_trunk_weights(self.root, self.spec.weights_sha256)

    @torch.inference_mode(mode=False)  # whatever mode asks for it, any may use what is loaded
    def load_statistics(self, group: str, shard: int | None = None) -> Statistics:
        """A group's statistics; or those in one of its shards.

        Raises:
            ModelError: if a file is missing or can't be what it should be.
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
        """A group's fitted density; or the part in one of its shards.

        Raises:
            ModelError: if a file is missing or can't be what it should be.
        """
        density, runs = self.spec.density, self._runs(group)

        def make(device: str) -> Fitted:
            return density.empty_fitted(self.spec.grid, device)

        if not density.per_cell:
            runs = [(0, self.spec.grid.cells[-1])]
        return self._load(group, make, self.density_file, density.unpack_fitted, runs, shard)

    def _runs(self, group: str) -> list[tuple[int, int]]:
        """The runs of coarsest cells by which a group is sharded."""
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
        """Read shards into one state, a few at a time: memory for little more than it.

        Args:
            make: a state of the group's shape, on a device.
            file: where a shard is.
            unpack: a shard's tensors.
            runs: the coarsest cells of each.
            shard: the only one that is wanted.
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
        """Read what leave-one-out gave; None if the group isn't calibrated."""
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


def describe_version(root: Location, number: int) -> Description:
    """What a published version's model.json says; ModelError if it can't be a model's."""
    return read_description(root, version_location(root, number) / MODEL)


def load_trunk_weights(root: Location, sha256: str) -> StateDict:
    """Read the trunk's weights; ModelError if they are missing or have another hash."""
    location = trunk_location(root, sha256)
    weights = load_trunk(root, location, TRUNK_BYTES)
    if weights_sha256(weights) != sha256:
        raise ModelError(f"{location.uri} doesn't hold the weights the model was fitted with")
    return weights
