"""The detector: images in, scores and anomaly maps out. Used by actors, `PadimModel` and `plan`."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from padim_ray.densities.base import Fitted, Statistics
from padim_ray.features.embedder import Embedder
from padim_ray.features.grid import Embeddings
from padim_ray.features.trunk import Trunk
from padim_ray.features.weights import StateDict
from padim_ray.features.workers import Workers
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.anomaly_map import image_scores


class Detections(NamedTuple):
    """What a detector finds in a batch of images, float32 on its device.

    Attributes:
        scores: (B,), each map's maximum.
        distances: (B, H_0, W_0), of the finest level's cells.
        maps: (B, H, W), distances upsampled and smoothed.
    """

    scores: torch.Tensor
    distances: torch.Tensor
    maps: torch.Tensor


class Detector:
    """Trunk, density and anomaly map of a model, on a device; groups' numbers are arguments.

    Args:
        spec: the model's.
        weights: its trunk's.
        device: to compute on.
        batch_size: images per pass through the trunk. Default: as many as suit the device.
        threads: that work side by side, see `Workers`.
        reuse: see `Embedder`.

    Attributes:
        embedder: its trunk and grid.
        workers: its threads.
        batch_size: how many images are best given to one call.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: StateDict,
        device: torch.device | str,
        batch_size: int | None = None,
        threads: int | None = None,
        *,
        reuse: bool = False,
    ) -> None:
        self.spec, self.density, self.device = spec, spec.density, torch.device(device)
        self.workers = Workers(threads)
        trunk = Trunk(
            spec.backbone,
            spec.channels,
            weights,
            precision=spec.precision,
            device=device,
            pass_size=batch_size if self.device.type == "cuda" else None,
        )
        self._dtype = trunk.dtype
        self.embedder = Embedder(
            trunk, spec.grid, self.device, batch_size, self.workers, reuse=reuse
        )
        self.batch_size = self.embedder.batch_size

    def embed(self, images: torch.Tensor) -> Embeddings:
        """Images (B, 3, H, W), 0…255, to their features at all cells, on the device."""
        return self.embedder.embed(images)

    def embed_each(self, batches: Iterable[torch.Tensor]) -> Iterator[Embeddings]:
        """Embed batches one after the other; the next are on their way meanwhile."""
        return self.embedder.embed_each(batches)

    def empty_statistics(self) -> Statistics:
        """Statistics of no images, on the device."""
        return self.density.empty(self.spec.grid, self.device)

    def add_(self, statistics: Statistics, embeddings: Embeddings) -> Statistics:
        """Add a batch's embeddings to statistics, in place in their tensors."""
        return statistics.add_(embeddings, self.workers)

    def load(self, fitted: Fitted) -> Fitted:
        """Bring a group's fitted density to the device."""
        return self.density.load(fitted, self.device, self._dtype)

    def detect(
        self, images: torch.Tensor, fitted: Fitted, *, left_out_of: int | None = None
    ) -> Detections:
        """Score images: embed, measure distances, draw maps.

        Args:
            images: (B, 3, H, W), 0…255.
            fitted: their group's density, from `load`.
            left_out_of: the number of images that the density was fitted to, if these are among
                them and are to be scored as if they were not.
        """
        return self.measure(self.embed(images), fitted, left_out_of=left_out_of)

    @torch.inference_mode()
    def measure(
        self, embeddings: Embeddings, fitted: Fitted, *, left_out_of: int | None = None
    ) -> Detections:
        """See `detect`; of images that are embedded already."""
        nested = self.density.distances(
            fitted, embeddings, left_out_of=left_out_of, workers=self.workers
        )
        distances = self.spec.grid.unnest(nested)
        maps = self.spec.mapper.maps(distances)
        return Detections(image_scores(maps), distances, maps)


def fit_density(spec: ModelSpec, statistics: Statistics) -> Fitted:
    """Fit a group's density in one process, run of cells by run of cells.

    Raises:
        ModelError: a predicate that follows the group's name.
    """
    density = spec.density
    pooled = density.pool(statistics)
    runs = state_shards(spec) if density.per_cell else state_shards(spec)[:1]
    return density.join([density.fit(statistics.cells(*run), pooled) for run in runs])
