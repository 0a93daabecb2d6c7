"""A model's versions: what is in them, going back to one, and deleting old ones."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from padim_ray.errors import PadimError
from padim_ray.model.layout import (
    check_number,
    published_numbers,
    version_location,
    version_numbers,
)
from padim_ray.model.publish import make_current, remove_version
from padim_ray.model.rounds import remove_rounds
from padim_ray.model.version import ModelVersion, describe_version, open_version
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.scoring.calibration import Calibration
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location, safe_segment

log = logging.getLogger("padim_ray")
ALPHA = ScoreOptions.alpha


@dataclass(frozen=True)
class VersionInfo:
    """A line of a model's history.

    `bytes`: of its own files; the trunk's weights, which versions share, aren't among them.
    """

    number: int
    created_at: str
    why: str
    groups: int
    images: int
    bytes: int


@dataclass(frozen=True)
class GroupInfo:
    """A group of a version.

    `median`, `threshold`: of its leave-one-out scores; the latter at a false-alarm rate of `ALPHA`.
    None where the group isn't calibrated.
    """

    images: int
    failed: int
    calibrated: int
    median: float | None
    threshold: float | None
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What `padim-ray info` tells of a model: its history, and one version in detail."""

    model: str
    current: int
    versions: tuple[VersionInfo, ...]
    number: int
    settings: Mapping[str, Any]
    groups: Mapping[str, GroupInfo]
    trunk_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(root: Location, number: int | None = None) -> ModelInfo:
    """Look into a model.

    Args:
        number: the version to tell about in detail; default: the current one.

    Raises:
        ModelError: if there is no such version, or one that can't be a model's.
    """
    version = open_version(root, number)
    sizes = root.file_sizes()
    trunk = sizes.get(f"trunks/{version.spec.weights_sha256}.safetensors", 0)
    directories: Counter[str] = Counter()
    for path, size in sizes.items():
        *parents, _ = path.split("/")
        directories.update({"/".join(parents[:depth]): size for depth in (2, 4)})
    return ModelInfo(
        model=root.uri,
        current=check_number(root),
        versions=tuple(
            _version_info(root, each, directories[f"versions/{each:06d}"])
            for each in published_numbers(root)
        ),
        number=version.number,
        settings=_settings(version),
        groups={
            group: _group_info(
                version,
                group,
                directories[f"versions/{version.home(group):06d}/groups/{safe_segment(group)}"],
            )
            for group in version.groups
        },
        trunk_bytes=trunk,
    )


def _version_info(root: Location, number: int, size: int) -> VersionInfo:
    described = describe_version(root, number)
    images = sum(entry.images for entry in described.groups.values())
    return VersionInfo(
        number, described.created_at, described.why, len(described.groups), images, size
    )


def _settings(version: ModelVersion) -> dict[str, Any]:
    channels = {layer: len(kept) for layer, kept in version.spec.channels.items()}
    return version.spec.to_json() | {"channels": channels}


def _group_info(version: ModelVersion, group: str, size: int) -> GroupInfo:
    entry, calibration = version.groups[group], version.load_calibration(group)
    median, threshold = _summary(calibration) if calibration else (None, None)
    return GroupInfo(entry.images, entry.failed, entry.calibrated, median, threshold, size)


def _summary(calibration: Calibration) -> tuple[float, float]:
    return float(np.median(calibration.scores)), calibration.threshold(ALPHA)


def roll_back(root: Location, number: int) -> None:
    """Have readers open an earlier version from now on; later ones stay.

    Raises:
        PadimError: if there is no such version, or a job is writing to the model.
    """
    with claimed(root, "rollback"):
        number = check_number(root, number)
        open_version(root, number)  # before anybody relies on it
        for later in published_numbers(root):
            # a fit that was killed just before it made its version current would do so yet
            remove_rounds(version_location(root, later))
        make_current(root, number)
    log.info("%s: version %d is the current one", root.uri, number)


def prune(root: Location, keep: int) -> list[int]:
    """Delete all versions but the last `keep` and the current one, and what nothing refers to.

    Groups' files that a kept version refers to stay. So does an unfinished job, unless a later
    version was published: nothing would continue it.

    Returns:
        The numbers of the published versions that were deleted.

    Raises:
        PadimError: if there is no model, or a job is writing to it.
    """
    if keep < 1:
        raise PadimError(f"--keep must be at least 1, but is {keep}")
    with claimed(root, "prune"):
        current, published = check_number(root), published_numbers(root)
        kept = {current, *published[-keep:]}
        versions = [open_version(root, number) for number in kept]
        trunks = {version.spec.weights_sha256 for version in versions}
        needed: dict[int, set[str]] = {}
        for version in versions:
            for group in version.groups:
                needed.setdefault(version.home(group), set()).add(group)
        before = sum(root.file_sizes().values())
        for number in version_numbers(root):
            if number not in kept and number < published[-1]:
                remove_version(root, number, needed.get(number, ()))
        for file in (root / "trunks").list_files():
            if file.name.partition(".")[0] not in trunks:
                file.remove()
        freed = before - sum(root.file_sizes().values())
    removed = [number for number in published if number not in kept]
    log.info(
        "%s: %d version%s deleted, %d kept, %.1f MB freed",
        *(root.uri, len(removed), "s" * (len(removed) != 1), len(kept), freed / 1e6),
    )
    return removed
