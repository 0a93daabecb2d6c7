"""A model on storage: numbered versions that never change, and a pointer to the current one.

MODEL/
  CURRENT                                    names the version; replaced atomically, last
  trunks/<sha256>.safetensors                the trunk's weights, shared by the versions
  versions/000003/
    model.json                               format version, spec, groups
    manifest.parquet                         every image that the model was given, failed ones too
    groups/<group>/moments-00000-of-00012.safetensors    exact state, float64, to update from
    groups/<group>/gaussian-00000-of-00012.safetensors   mean and whitening, all that scoring loads
    groups/<group>/calibration.parquet       leave-one-out scores, ascending
    groups/<group>/pixels.parquet            histogram of their anomaly maps' values

A group's state is sharded by runs of coarsest cells, so that no process has to hold all of it to
merge, factorise or write it.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from safetensors import SafetensorError

from padim_ray import __version__, gaussian, moments
from padim_ray.calibration import Calibration
from padim_ray.errors import ModelError
from padim_ray.gaussian import Gaussian
from padim_ray.histogram import BINS, bin_edges, bin_indices
from padim_ray.moments import Moments
from padim_ray.spec import ModelSpec
from padim_ray.storage import Location, safe_segment
from padim_ray.trunk import StateDict, weights_sha256

FORMAT_VERSION = 1
LOADING_THREADS = 4  # a store sends several streams faster than one
SHARD_BYTES = 64 * 2**20  # of a group's unpacked float32 state

T = TypeVar("T")
State = TypeVar("State", Moments, Gaussian)


@dataclass(frozen=True)
class GroupEntry:
    """A group's line in model.json.

    `images`: in its moments. `failed`: images that aren't. `shards`: files of each kind of state.
    `calibrated`: images with a leave-one-out score; without any, nothing is calibrated.
    """

    images: int
    failed: int
    shards: int
    calibrated: int = 0


@dataclass(frozen=True)
class ModelVersion:
    """One published version: reads its parts."""

    root: Location
    number: int
    spec: ModelSpec
    groups: Mapping[str, GroupEntry]

    def load_trunk_weights(self) -> StateDict:
        """Read the trunk's weights; ModelError if they aren't those that the model names."""
        return load_trunk_weights(self.root, self.spec.weights_sha256)

    def load_gaussian(self, group: str) -> Gaussian:
        return gaussian.concatenate(self._load_shards(group, "gaussian", gaussian.from_tensors))

    def load_moments(self, group: str) -> Moments:
        return moments.concatenate(self._load_shards(group, "moments", moments.from_tensors))

    def load_calibration(self, group: str) -> Calibration | None:
        """Read what leave-one-out gave; None if the group isn't calibrated."""
        if not self.groups[group].calibrated:
            return None
        scores, pixels = _calibration_locations(self.root, self.number, group)
        return Calibration(_load(scores, _read_scores), _load(pixels, _read_pixels))

    def load_manifest(self) -> pa.Table:
        """Every image that the model's jobs were given, with `status` and `error`."""
        return _load(_version(self.root, self.number) / "manifest.parquet", pq.read_table)

    def _load_shards(
        self, group: str, kind: str, parse: Callable[[Mapping[str, torch.Tensor]], State]
    ) -> list[State]:
        count = self.groups[group].shards
        files = [
            shard_location(self.root, self.number, group, kind, index, count)
            for index in range(count)
        ]
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            shards = list(pool.map(lambda file: _load_tensors(file, parse), files))
        for file, shard in zip(files, shards, strict=True):
            if tuple(mean.shape[1] for mean in shard.means) != self.spec.grid.channels:
                raise ModelError(f"{file.uri} can't be understood: it is not of this model")
        return shards


def open_version(root: Location) -> ModelVersion:
    """The current version of the model at `root`.

    Raises:
        ModelError: if there is no model, or one of another format.
    """
    number = current_number(root)
    if number is None:
        raise ModelError(f"There is no model at {root.uri}")
    location = _version(root, number) / "model.json"
    try:
        content = json.loads(location.read())
        found = content["format_version"]
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{location.uri} is missing or not a model's: {error}") from error
    if found != FORMAT_VERSION:
        raise ModelError(
            f"{location.uri} has format version {found}, and this padim-ray reads "
            f"{FORMAT_VERSION}; use the padim-ray that fitted it, or fit again"
        )
    try:
        groups = {name: GroupEntry(**entry) for name, entry in content["groups"].items()}
        return ModelVersion(root, number, ModelSpec.from_json(content["spec"]), groups)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{location.uri} can't be understood: {error}") from error


def current_number(root: Location) -> int | None:
    """The number that CURRENT names, None where there is no model."""
    try:
        text = (root / "CURRENT").read()
    except FileNotFoundError:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ModelError(f"{root.uri}/CURRENT doesn't name a version: {text[:40]!r}") from error


def save_trunk_weights(root: Location, weights: StateDict) -> None:
    """Store the trunk's weights under their own hash, unless they are there already."""
    location = _trunk(root, weights_sha256(weights))
    if not location.exists():
        save_tensors(location, weights)


def load_trunk_weights(root: Location, sha256: str) -> StateDict:
    """Read the trunk's weights; ModelError if they are missing or have another hash."""
    location = _trunk(root, sha256)
    weights = _load_tensors(location, dict)
    if weights_sha256(weights) != sha256:
        raise ModelError(f"{location.uri} doesn't hold the weights the model was fitted with")
    return weights


def publish(
    root: Location,
    number: int,
    spec: ModelSpec,
    groups: Mapping[str, GroupEntry],
    manifest: pa.Table,
) -> None:
    """Make a version whose group files are already written the current one."""
    location = _version(root, number)
    (location / "manifest.parquet").write_table(manifest)
    content = {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {  # padim-ray's own also where it runs from its sources, not installed
            "padim-ray": __version__,
            **{name: package_version(name) for name in ("torch", "torchvision")},
        },
        "spec": spec.to_json(),
        "groups": {name: asdict(entry) for name, entry in sorted(groups.items())},
    }
    (location / "model.json").write(json.dumps(content, indent=1, ensure_ascii=False).encode())
    (root / "CURRENT").write(f"{number:06d}\n".encode())


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


def _read_scores(path: Path) -> np.ndarray:
    return pq.read_table(path)["score"].to_numpy().astype(np.float32)


def _read_pixels(path: Path) -> np.ndarray:
    table = pq.read_table(path)
    counts = np.zeros(BINS, np.int64)
    counts[bin_indices(table["value"].to_numpy())] = table["count"].to_numpy()
    return counts


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
        safetensors.torch.save_file(dict(tensors), path)


def _load_tensors(location: Location, parse: Callable[[Mapping[str, torch.Tensor]], T]) -> T:
    return _load(location, lambda path: parse(safetensors.torch.load_file(path)))


def _load(location: Location, parse: Callable[[Path], T]) -> T:
    try:
        with location.as_local_file() as path:
            return parse(path)
    except FileNotFoundError as error:
        raise ModelError(f"The model is incomplete: {location.uri} is missing") from error
    except (SafetensorError, KeyError, RuntimeError, OSError, pa.ArrowException) as error:
        raise ModelError(f"{location.uri} can't be understood: {error}") from error


def _version(root: Location, number: int) -> Location:
    return root / f"versions/{number:06d}"


def _group(root: Location, number: int, group: str) -> Location:
    return _version(root, number) / "groups" / safe_segment(group)


def _trunk(root: Location, sha256: str) -> Location:
    return root / f"trunks/{sha256}.safetensors"
