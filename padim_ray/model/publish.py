"""Write the files of a model version, and publish it last."""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib.metadata import version as package_version

import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError

from padim_ray import __version__
from padim_ray.errors import ModelError
from padim_ray.features.weights import StateDict, weights_sha256
from padim_ray.model.layout import (
    MODEL,
    calibration_locations,
    group_location,
    trunk_location,
    version_location,
)
from padim_ray.model.model_json import FORMAT_VERSION, MANIFEST, GroupEntry
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import bin_edges
from padim_ray.storage.fail_points import kill_at
from padim_ray.storage.location import Location


def save_trunk_weights(root: Location, weights: StateDict) -> None:
    """Store the trunk's weights under their own hash, unless they are there already."""
    location = trunk_location(root, weights_sha256(weights))
    if not location.exists():
        save_tensors(location, weights)


def publish(
    root: Location,
    number: int,
    spec: ModelSpec,
    groups: Mapping[str, GroupEntry],
    manifest: pa.Table,
    why: str,
) -> None:
    """Publish a version whose groups' files are written, and make it the current one.

    Args:
        root: the model's directory.
        number: the version's number.
        spec: the model's specification.
        groups: its groups by name.
        manifest: every image that the model was given.
        why: what made the version, one line for people.

    Raises:
        ModelError: if another job has published this version meanwhile. Its files stay as they are.
    """
    location, unique = version_location(root, number), secrets.token_hex(8)
    manifest_file = location / f"manifest-{unique}.parquet"
    manifest_file.write_table(manifest)
    kill_at("fit:version-written")
    content = {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "why": why,
        "created_by": unique,  # makes the file, and so its hash, unique
        "manifest": manifest_file.name,
        "versions": {  # padim-ray may run from its sources, without package metadata
            "padim-ray": __version__,
            **{name: package_version(name) for name in ("torch", "torchvision")},
        },
        "spec": spec.to_json(),
        "groups": {name: entry.to_json() for name, entry in sorted(groups.items())},
    }
    try:
        (location / MODEL).create(json.dumps(content, indent=1, ensure_ascii=False).encode())
    except FileExistsError as error:
        manifest_file.remove()
        raise ModelError(f"{location.uri} was published by another job meanwhile") from error
    kill_at("fit:model-written")
    make_current(root, number)


def remove_manifests(root: Location, number: int) -> None:
    """Delete what killed attempts to publish left in a version that isn't published."""
    for file in version_location(root, number).list_files():
        if re.fullmatch(MANIFEST, file.name):
            file.remove()


def make_current(root: Location, number: int) -> None:
    """Make a version the current one: readers open it from now on."""
    (root / "CURRENT").write(f"{number:06d}\n".encode())


def remove_version(root: Location, number: int, kept_groups: Collection[str] = ()) -> None:
    """Delete a version except `kept_groups`, whose files other versions refer to."""
    location = version_location(root, number)
    (location / MODEL).remove()  # first: if the job is killed here, the rest isn't published
    kept = tuple(f"{group_location(root, number, group).uri}/" for group in kept_groups)
    if not kept:
        location.remove_all()
    for file in location.list_files() if kept else []:
        if not file.uri.startswith(kept):
            file.remove()


def save_calibration(root: Location, number: int, group: str, calibration: Calibration) -> None:
    """Write a group's calibration."""
    occupied = calibration.pixels > 0
    for location, columns in zip(
        calibration_locations(root, number, group),
        (
            {"score": calibration.scores},
            {"value": bin_edges()[:-1][occupied], "count": calibration.pixels[occupied]},
        ),
        strict=True,
    ):
        location.write_table(pa.table(columns))


def save_tensors(location: Location, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as a safetensors file, atomically."""
    with location.replaced_by() as path:
        try:
            cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            safetensors.torch.save_file(cpu, path)
        except SafetensorError as error:  # raised for a full disk, too
            raise OSError(str(error)) from error
