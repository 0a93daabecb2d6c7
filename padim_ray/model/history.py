"""The versions of a model: inspect them, roll back to one, delete old ones."""

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
from padim_ray.model.readers import PRUNE, find_readers
from padim_ray.model.rounds import remove_rounds
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion, describe_version, open_version
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.scoring.calibration import Calibration
from padim_ray.storage.claim import claimed
from padim_ray.storage.heartbeat import show_process
from padim_ray.storage.location import Location, safe_segment

log = logging.getLogger("padim_ray")
ALPHA = ScoreOptions.alpha


@dataclass(frozen=True)
class VersionInfo:
    """One version in a model's history.

    Attributes:
        number: the version's number.
        created_at: ISO 8601, in UTC.
        why: what made the version, for people.
        groups: the number of groups.
        images: the number of images in all groups' statistics.
        bytes: size of the version's files, without the trunk's weights, which versions share, and
            without files of earlier versions that it refers to.
        statistics_bytes: of these, the groups' statistics.
        density_bytes: of these, the groups' fitted densities.
    """

    number: int
    created_at: str
    why: str
    groups: int
    images: int
    bytes: int
    statistics_bytes: int
    density_bytes: int


@dataclass(frozen=True)
class GroupInfo:
    """One group of a version.

    Attributes:
        images: the number of images in its statistics.
        failed: the number of images that could not be read.
        calibrated: the number of images with a leave-one-out score.
        median: of the leave-one-out scores; None if the group isn't calibrated.
        threshold: the score threshold at a false-alarm rate of `ALPHA`; None likewise.
        bytes: size of the group's files.
        statistics_bytes: of these, its statistics.
        density_bytes: of these, its fitted density.
    """

    images: int
    failed: int
    calibrated: int
    median: float | None
    threshold: float | None
    bytes: int
    statistics_bytes: int
    density_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """A model's history, and one version in detail, as `padim-ray info` shows them.

    Attributes:
        model: the model's URI.
        current: the number of the current version.
        versions: the published versions, ascending.
        number: the version that the other fields describe.
        settings: its specification, with the number of channels per layer.
        groups: its groups by name.
        trunk_bytes: size of the trunk's weights.
        bytes: size of all files: every version, every trunk, and what an unfinished job has left.
    """

    model: str
    current: int
    versions: tuple[VersionInfo, ...]
    number: int
    settings: Mapping[str, Any]
    groups: Mapping[str, GroupInfo]
    trunk_bytes: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(root: Location, number: int | None = None) -> ModelInfo:
    """Describe a model and one of its versions.

    Args:
        root: the model's directory.
        number: the version to describe in detail. Default: the current one.

    Raises:
        ModelError: if there is no such version, or a file is invalid.
    """
    version = open_version(root, number)
    found = root.file_sizes()
    sizes = {name: size for name, size in found.items() if not name.startswith(".")}
    trunk = sizes.get(f"trunks/{version.spec.weights_sha256}.safetensors", 0)
    directories: dict[str, Counter[str]] = {}  # sizes by kind of file, as the names begin
    for path, size in sizes.items():
        *parents, name = path.split("/")
        for directory in {"/".join(parents[:depth]) for depth in (2, 4)}:
            directories.setdefault(directory, Counter())[name.partition("-")[0]] += size
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
        bytes=sum(sizes.values()),
    )


def _version_info(root: Location, number: int, sizes: Counter[str]) -> VersionInfo:
    described = describe_version(root, number)
    images = sum(entry.images for entry in described.groups.values())
    return VersionInfo(
        number,
        described.created_at,
        described.why,
        len(described.groups),
        images,
        *_split(sizes, described.spec),
    )


def _split(sizes: Counter[str], spec: ModelSpec) -> tuple[int, int, int]:
    """All bytes of a directory, those of statistics, and those of densities."""
    return sizes.total(), sizes[spec.density.statistics_kind], sizes[spec.density.kind]


def _settings(version: ModelVersion) -> dict[str, Any]:
    channels = {layer: len(kept) for layer, kept in version.spec.channels.items()}
    return version.spec.to_json() | {"channels": channels}


def _group_info(version: ModelVersion, group: str, sizes: Counter[str]) -> GroupInfo:
    entry, calibration = version.groups[group], version.load_calibration(group)
    median, threshold = _summary(calibration) if calibration else (None, None)
    return GroupInfo(
        entry.images,
        entry.failed,
        entry.calibrated,
        median,
        threshold,
        *_split(sizes, version.spec),
    )


def _summary(calibration: Calibration) -> tuple[float, float]:
    return float(np.median(calibration.scores)), calibration.threshold(ALPHA)


def roll_back(root: Location, number: int) -> None:
    """Make a published version the current one; other versions stay.

    Raises:
        PadimError: if there is no such version, or a job is writing to the model.
    """
    with claimed(root, "rollback") as claim:
        root = claim.root
        number = check_number(root, number)
        open_version(root, number)  # raises if it can't be read
        for later in published_numbers(root):
            # otherwise a fit that was killed after publishing would resume, and undo the roll-back
            remove_rounds(version_location(root, later))
        make_current(root, number)
    log.info("%s: version %d is the current one", root.uri, number)


def prune(root: Location, keep: int) -> list[int]:
    """Delete old versions, and trunks and groups' files that no kept version refers to.

    Versions that running jobs read stay, if these could say so in the model (see `readers`). An
    unfinished job's files stay, unless a later version was published: then nothing would
    continue the job.

    Args:
        root: the model's directory.
        keep: the number of latest versions to keep; the current version is kept as well.

    Returns:
        The numbers of the deleted versions that were published.

    Raises:
        PadimError: if there is no model, a job is writing to it, or `keep` is below 1.
    """
    if keep < 1:
        raise PadimError(f"--keep must be at least 1, but is {keep}")
    with claimed(root, PRUNE) as claim:
        root = claim.root
        current, published = check_number(root), published_numbers(root)
        kept = {current, *published[-keep:]}
        for number, reader in find_readers(root).items():
            if number in published and number not in kept:
                log.warning(
                    "Version %d stays, because a %s job reads it: %s",
                    *(number, reader.get("job"), show_process(reader)),
                )
                kept.add(number)
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
