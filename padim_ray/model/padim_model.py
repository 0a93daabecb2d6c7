"""PadimModel: fit and score in one process, with batches of images from a DataLoader."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities import MIN_IMAGES, MIN_LEFT_OUT_OF
from padim_ray.densities.base import Fitted, Statistics
from padim_ray.errors import ModelError
from padim_ray.features.grid import Embeddings
from padim_ray.features.trunk import native_precision
from padim_ray.features.weights import StateDict
from padim_ray.images.manifest import DEFAULT_GROUP, TEXT
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.draft import DraftVersion
from padim_ray.model.layout import next_number, state_shards, version_location
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.publish import (
    publish,
    remove_manifests,
    save_calibration,
    save_trunk_weights,
)
from padim_ray.model.spec import ModelSpec, new_spec
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.runs.job_record import JOB
from padim_ray.runs.options.model import ModelOptions
from padim_ray.scoring.anomaly_map import image_scores
from padim_ray.scoring.calibration import Calibration
from padim_ray.scoring.histogram import count_values
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location

PARTIAL_IMAGES = 512  # images in a float32 partial sum before it is merged into the float64 one
EMPTY_MANIFEST = pa.table({name: pa.array([], TEXT) for name in ("uri", "group")})


class Scores(NamedTuple):
    """The scores of a batch of images, float32 on the CPU.

    Attributes:
        scores: (B,), the mean of the highest share of cells, or the maximum of the anomaly map.
        maps: (B, H, W), the anomaly maps: smoothed distances at every pixel.
    """

    scores: torch.Tensor
    maps: torch.Tensor


class PadimModel:
    """PaDiM (Defard et al. 2021) with exact moments in constant memory.

    >>> model = PadimModel(weights="trunk.pth")  # doctest: +SKIP
    >>> for images in loader:  # doctest: +SKIP
    ...     model.update(images)
    >>> scores, maps = model.score(images)  # doctest: +SKIP

    A second pass over the training images gives thresholds; they need no defective images:

    >>> for images in loader:  # doctest: +SKIP
    ...     model.calibrate(images)
    >>> threshold = model.calibration().threshold(0.01)  # doctest: +SKIP

    Args:
        device: device of the trunk and of everything fitted. Default: the GPU if there is one.
        storage_options: fsspec's, for weights on an object store.
        options: the fields of `ModelOptions`, named as on the command line.

    Raises:
        PadimError: if the options don't fit together, or the weights can't be read.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        device = device or _default_device()
        chosen = ModelOptions(**options)
        precision = native_precision(device) if chosen.precision == "auto" else chosen.precision
        self._set_up(*new_spec(chosen, precision, storage_options), device)

    def _set_up(self, spec: ModelSpec, weights: StateDict, device: torch.device | str) -> None:
        self._weights = weights
        self._detector = Detector(spec, weights, device)
        self._version: ModelVersion | None = None  # has the groups that aren't in memory
        self._updated: set[str] = set()  # groups with images that the stored version hasn't
        self._partials: dict[str, Statistics] = {}  # float32 partial sums of the latest images
        self._statistics: dict[str, Statistics] = {}
        self._fitted: dict[str, Fitted] = {}
        self._calibrations: dict[str, Calibration] = {}

    @property
    def spec(self) -> ModelSpec:
        return self._detector.spec

    @property
    def counts(self) -> dict[str, int]:
        """The number of images in each group's statistics."""
        return {group: self._count(group) for group in self._groups()}

    def _groups(self) -> list[str]:
        stored = self._version.groups if self._version else {}
        return sorted({*stored, *self._statistics, *self._partials})

    def _count(self, group: str) -> int:
        counts = [sums[group].count for sums in (self._statistics, self._partials) if group in sums]
        if group not in self._statistics and self._version and group in self._version.groups:
            counts.append(self._version.groups[group].images)
        return sum(counts)

    def update(self, images: torch.Tensor | np.ndarray, *, group: str = DEFAULT_GROUP) -> None:
        """Add a batch of good images to a group.

        Args:
            images: (B, 3, H, W) of the model's input size, uint8 in 0…255 or floats in 0…1, not
                normalised.
            group: name of the group; a new one is created.

        Raises:
            ValueError: if the images have another shape, type or range.
            ModelError: if an image has NaN or infinite features.
        """
        embeddings = self._embed(images, group)
        if group not in self._partials:
            self._partials[group] = self._detector.empty_statistics()
        self._partials[group] = self._detector.add_(self._partials[group], embeddings)
        self._updated.add(group)
        self._fitted.pop(group, None)
        self._calibrations.pop(group, None)
        if self._partials[group].count >= PARTIAL_IMAGES:
            self._merge(group)

    def _merge(self, group: str) -> Statistics:
        """Merge the group's partial sum into its statistics, and return these."""
        if group not in self._statistics and self._version and group in self._version.groups:
            self._statistics[group] = self._version.load_statistics(group).to(self._detector.device)
        if group in self._partials:
            latest = self._partials.pop(group).double()
            kept = self._statistics.get(group)
            self._statistics[group] = latest if kept is None else kept.double() + latest
        return self._statistics[group]

    def finalize(self) -> None:
        """Fit the densities of all groups that changed since the last time.

        More images may be added afterwards. `score` and `save` fit by themselves if needed.

        Raises:
            ModelError: if a group has fewer than 2 images, or its images hardly differ.
        """
        for group in self._groups():
            self._density(group)

    def _density(self, group: str) -> Fitted:
        """The group's fitted density: from memory, from storage, or fitted now."""
        if group not in self._fitted:
            if version := self._unchanged(group):
                self._fitted[group] = self._detector.load(version.load_density(group))
            else:
                self._fitted[group] = self._detector.load(self._fit(group))
        return self._fitted[group]

    def _unchanged(self, group: str) -> ModelVersion | None:
        """The stored version, if it has the group and no image was added since."""
        is_stored = self._version is not None and group in self._version.groups
        return self._version if is_stored and group not in self._updated else None

    def _fit(self, group: str) -> Fitted:
        statistics = self._merge(group)
        try:
            if statistics.count < MIN_IMAGES:
                raise ModelError(f"has {statistics.count} image; a fit needs at least {MIN_IMAGES}")
            return fit_density(self.spec, statistics)
        except ModelError as error:
            raise ModelError(f"Group {group!r} {error}") from error

    def score(
        self,
        images: torch.Tensor | np.ndarray,
        *,
        group: str = DEFAULT_GROUP,
        sigma: float | None = None,
    ) -> Scores:
        """Score a batch of images with a group's density.

        Args:
            images: as for `update`.
            group: name of the group.
            sigma: standard deviation of the maps' smoothing, in pixels. Default: the model's.

        Raises:
            ValueError: if the images have another shape, type or range.
            ModelError: if the group has no images, or can't be fitted.
        """
        if group not in self._groups():
            raise ModelError(f"No images of group {group!r} were given to update()")
        found = self._detector.measure(self._embed(images, group), self._density(group))
        if sigma is None:
            return Scores(found.scores.cpu(), found.maps.cpu())
        maps = replace(self.spec.mapper, sigma=sigma).maps(found.distances)
        scores = found.scores if self.spec.score_share else image_scores(found.distances, maps, 0)
        return Scores(scores.cpu(), maps.cpu())

    def calibrate(
        self, images: torch.Tensor | np.ndarray, *, group: str = DEFAULT_GROUP
    ) -> torch.Tensor:
        """Add training images to a group's calibration.

        Call it with images that `update` was given, all of them or a sample, after the last
        `update`, which empties the calibration.

        Args:
            images: as for `update`.
            group: name of the group.

        Returns:
            (B,) leave-one-out scores: those of a model fitted without the image.

        Raises:
            ValueError: if the images have another shape, type or range.
            ModelError: if the group has fewer than 3 images.
        """
        embeddings = self._embed(images, group)
        count = self._count(group)
        if count < MIN_LEFT_OUT_OF:
            raise ModelError(
                f"Group {group!r} has {count} images; leaving one out takes {MIN_LEFT_OUT_OF}"
            )
        found = self._detector.measure(embeddings, self._density(group), left_out_of=count)
        scores = found.scores.cpu()
        added = Calibration(np.sort(scores.numpy()), count_values(found.maps.cpu().numpy()))
        kept = self._calibrations.get(group)  # a stored calibration is replaced, not added to
        self._calibrations[group] = kept + added if kept else added
        return scores

    def calibration(self, group: str = DEFAULT_GROUP) -> Calibration | None:
        """The group's calibration, which gives thresholds and p-values; None if it has none."""
        version = self._unchanged(group)
        if group in self._calibrations or version is None:
            return self._calibrations.get(group)
        return version.load_calibration(group)

    def save(self, uri: str, storage_options: Mapping[str, Any] | None = None) -> int:
        """Publish the model as a new version at `uri`, and return the version's number.

        Args:
            uri: directory of the model, local or on an object store.
            storage_options: fsspec's, for an object store.

        Raises:
            PadimError: if a job is writing to that model, or writing fails.
        """
        root = Location.of(uri, storage_options)
        with claimed(root, "save") as claim:
            root = claim.root
            number = next_number(root)
            while (version_location(root, number) / JOB).exists():
                number += 1  # an unfinished fit has this number
            remove_manifests(root, number)
            self._save(root, number)
        return number

    def _save(self, root: Location, number: int) -> None:
        save_trunk_weights(root, self._weights)
        draft, runs = DraftVersion.of(root, number, self.spec), state_shards(self.spec)
        groups = {}
        for group in self._groups():
            fitted, statistics = self._density(group), self._merge(group)
            for shard, run in enumerate(runs):
                draft.save_statistics(group, shard, statistics.cells(*run))
            for shard, run in enumerate(runs[: draft.density_shards]):
                draft.save_density(group, shard, fitted.cells(*run))
            stored = self._version.groups.get(group) if self._version else None
            failed = stored.failed if stored else 0
            calibration = self.calibration(group)
            if calibration:
                save_calibration(root, number, group, calibration)
            calibrated = len(calibration.scores) if calibration else 0
            groups[group] = GroupEntry(statistics.count, failed, len(runs), calibrated)
        # images that were given as tensors have no names: they are in the counts only
        manifest = self._version.load_manifest() if self._version else EMPTY_MANIFEST
        images = sum(entry.images for entry in groups.values())
        publish(
            root, number, self.spec, groups, manifest, f"saved from Python with {images} images"
        )

    @classmethod
    def load(
        cls,
        uri: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "PadimModel":
        """Load a stored model, to score with it or to update it.

        Groups are loaded when they are first used.

        Args:
            uri: the model's directory, with `@3` at the end for version 3. Default: the current
                version.
            storage_options: fsspec's, for an object store.
            device: as for `PadimModel`.

        Raises:
            ModelError: if there is no model, or it is damaged or of another format version.
        """
        device = device or _default_device()
        version = open_named(uri, storage_options)
        model = cls.__new__(cls)
        model._set_up(version.spec, version.load_trunk_weights(), device)
        model._version = version
        return model

    def _embed(self, images: torch.Tensor | np.ndarray, group: str) -> Embeddings:
        embeddings = self._detector.embed(_checked(images, self.spec.preprocessing.size))
        bad = (~embeddings.are_finite()).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"Group {group!r}: images {bad} of the batch give NaN or infinite features; "
                "nothing was added"
            )
        return embeddings


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked(images: torch.Tensor | np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
        raise ValueError(
            f"images must be (B, 3, {size[0]}, {size[1]}), but are {tuple(images.shape)}"
        )
    if len(images) == 0:
        raise ValueError("the batch is empty")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating-point, not {images.dtype}")
    if not (images.min() >= 0 and images.max() <= 1):  # false for NaN as well
        raise ValueError(
            f"floating-point images must be in 0…1, but reach from {images.min():.3g} to "
            f"{images.max():.3g}; the model applies ImageNet's normalisation itself"
        )
    return images * 255
