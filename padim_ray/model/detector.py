"""The detector: from images to scores and anomaly maps, without Ray."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from padim_ray.densities.base import Fitted, Statistics
from padim_ray.densities.search import cells_around, most_distant_after_search
from padim_ray.features.embedder import Embedder
from padim_ray.features.grid import Embeddings
from padim_ray.features.trunk import Trunk
from padim_ray.features.weights import StateDict
from padim_ray.features.workers import ONE_BY_ONE, Workers
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.anomaly_map import cells_of_share, image_scores


class Detections(NamedTuple):
    """A detector's results for a batch of images, float32 on its device.

    Attributes:
        scores: (B,), see `image_scores`; with search, the mean of the cells that are most distant
            after it.
        distances: (B, H_0, W_0), at the cells of the finest level.
        maps: (B, H, W), the anomaly maps: distances upsampled to the input size and smoothed.
    """

    scores: torch.Tensor
    distances: torch.Tensor
    maps: torch.Tensor


class Detector:
    """A model's trunk, density and anomaly maps on a device.

    It holds nothing of a group: statistics and fitted densities are arguments.

    Args:
        spec: the model's specification.
        weights: the trunk's weights.
        device: device to compute on.
        batch_size: images per pass through the trunk. Default: as many as suit the device.
        threads: number of threads, see `Workers`.
        reuse: see `Embedder`.

    Attributes:
        spec: the model's specification.
        density: its density.
        device: the device.
        embedder: computes the embeddings.
        workers: the threads.
        batch_size: the number of images per call that is fastest.

    Raises:
        ModelError: if the weights don't fit the trunk.
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
            trunk,
            spec.grid,
            self.device,
            batch_size,
            self.workers,
            neighbourhood=spec.neighbourhood,
            reuse=reuse,
        )
        self.batch_size = self.embedder.batch_size

    def embed(self, images: torch.Tensor) -> Embeddings:
        """Embed images (B, 3, H, W) in 0…255; the embeddings are on the device."""
        return self.embedder.embed(images)

    def embed_each(self, batches: Iterable[torch.Tensor]) -> Iterator[Embeddings]:
        """Embed batches one after the other, copying the next ones to a GPU while it computes."""
        return self.embedder.embed_each(batches)

    def empty_statistics(self) -> Statistics:
        """Statistics of no images, on the device."""
        return self.density.empty(self.spec.grid, self.device)

    def add_(self, statistics: Statistics, embeddings: Embeddings) -> Statistics:
        """Add a batch of embeddings, in place in the statistics' tensors; see `Statistics.add_`."""
        return statistics.add_(embeddings, self.workers)

    def load(self, fitted: Fitted) -> Fitted:
        """Move a group's fitted density to the device, and prepare it for `detect`."""
        return self.density.load(fitted, self.device, self._dtype)

    def detect(
        self, images: torch.Tensor, fitted: Fitted, *, left_out_of: int | None = None
    ) -> Detections:
        """Score images: embed them, compute distances, upsample and smooth.

        Args:
            images: (B, 3, H, W) in 0…255.
            fitted: their group's density, from `load`.
            left_out_of: the number of images that the density was fitted to. If given, the images
                must be some of these, and each is scored as if it had been left out of the fit.
        """
        return self.measure(self.embed(images), fitted, left_out_of=left_out_of)

    def measure(
        self, embeddings: Embeddings, fitted: Fitted, *, left_out_of: int | None = None
    ) -> Detections:
        """As `detect`, from embeddings."""
        return measure(self.spec, embeddings, fitted, left_out_of=left_out_of, workers=self.workers)


@torch.inference_mode()
def measure(
    spec: ModelSpec,
    embeddings: Embeddings,
    fitted: Fitted,
    *,
    left_out_of: int | None = None,
    workers: Workers = ONE_BY_ONE,
) -> Detections:
    """Score embeddings: compute distances, upsample and smooth; see `Detector.detect`."""
    nested = spec.density.distances(fitted, embeddings, left_out_of=left_out_of, workers=workers)

    def search(images: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        around = cells_around(spec.grid, spec.search).to(cells.device)[cells]
        return spec.density.search(
            *(fitted, embeddings, images, cells, around), left_out_of=left_out_of, workers=workers
        )

    if spec.search and (spec.search_maps or not spec.score_share):
        cells, images = (torch.arange(n, device=nested.device) for n in nested.shape)
        everywhere = search(images.repeat_interleave(len(cells)), cells.repeat(len(images)))
        nested = everywhere.view(len(images), -1).T
    distances = spec.grid.unnest(nested)
    maps = spec.mapper.maps(distances)
    if spec.search and spec.score_share and not spec.search_maps:
        count = cells_of_share(spec.score_share, len(nested))
        scores = most_distant_after_search(nested.T, count, search).mean(1)
    else:
        scores = image_scores(distances, maps, spec.score_share)
    return Detections(scores, distances, maps)


def fit_density(spec: ModelSpec, statistics: Statistics) -> Fitted:
    """Fit a group's density in one process, shard by shard as the pipeline does.

    Raises:
        ModelError: if there are too few images, or they hardly differ; a predicate that follows the
            group's name.
    """
    density = spec.density
    pooled = density.pool(statistics)
    runs = state_shards(spec) if density.per_cell else state_shards(spec)[:1]
    return density.join([density.fit(statistics.cells(*run), pooled) for run in runs])
