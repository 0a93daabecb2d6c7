"""Images to embeddings: run batches through the trunk, average its feature maps over cells."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
import torch

from padim_ray.features.cells import average_cells
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.trunk import CPU_PASS, GPU_PASS, Trunk
from padim_ray.features.uploads import Uploader
from padim_ray.features.workers import ONE_BY_ONE, Workers

# images per call: with fewer, reading and writing a group's state takes most of the time
GPU_BATCH = 1024
CPU_BATCH = 128


class Embedder:
    """Embeds images with a trunk.

    Args:
        trunk: computes the feature maps.
        grid: the levels' cells.
        device: the trunk's.
        pass_size: images per pass through the trunk. Default: as many as suit the device.
        workers: threads that embed images in parallel.
        neighbourhood: see `average_cells`.
        reuse: on CPUs, write all embeddings to the same memory: they are valid only until the next
            call. That saves the time in which the operating system clears newly allocated memory.

    Attributes:
        batch_size: the number of images that is fastest to embed, and process further, in one call.
    """

    def __init__(
        self,
        trunk: Trunk,
        grid: PatchGrid,
        device: torch.device,
        pass_size: int | None = None,
        workers: Workers = ONE_BY_ONE,
        *,
        neighbourhood: int = 1,
        reuse: bool = False,
    ) -> None:
        self.trunk, self.grid, self.device = trunk, grid, device
        if device.type == "cuda":
            self.pass_size = pass_size or GPU_PASS
            self.batch_size = max(1, GPU_BATCH // self.pass_size) * self.pass_size
            self._upload = Uploader(device)
        else:
            self.pass_size = pass_size or CPU_PASS
            self.batch_size = max(CPU_BATCH, self.pass_size)
        self._workers, self._neighbourhood = workers, neighbourhood
        self._reuse = reuse and device.type == "cpu"  # on GPUs, PyTorch reuses memory anyway
        self._room: Embeddings | None = None

    def embed(self, images: torch.Tensor) -> Embeddings:
        """Embed images (B, 3, H, W) in 0…255; the embeddings are on the device."""
        return next(self.embed_each([images]))

    def embed_each(self, batches: Iterable[torch.Tensor]) -> Iterator[Embeddings]:
        """Embed batches one after the other, copying the next ones to a GPU while it computes."""
        pending: deque[torch.Tensor] = deque()

        def parts() -> Iterator[torch.Tensor]:
            for images in batches:
                pending.append(images)
                yield from images.split(self.pass_size)

        arriving = parts() if self.device.type == "cpu" else self._upload(parts())
        for first in arriving:
            images = pending.popleft()
            number = max(1, -(-len(images) // self.pass_size))
            yield self._embed(len(images), chain([first], islice(arriving, number - 1)))

    @torch.inference_mode()
    def _embed(self, images: int, parts: Iterable[torch.Tensor]) -> Embeddings:
        embeddings = self._make_room(images)

        def embed(piece: tuple[torch.Tensor, Embeddings]) -> None:
            part, out = piece
            # a few images at a time, so that on CPUs their features stay in the cache
            averaged = average_cells(self.trunk(part), self.grid.grids, self._neighbourhood)
            self.grid.nest(averaged, out)

        self._workers.map(embed, zip(parts, embeddings.split(self.pass_size), strict=True))
        return embeddings

    def _make_room(self, images: int) -> Embeddings:
        if self._room and images <= len(self._room):
            return self._room[:images]
        room = self.grid.empty(images, self.trunk.dtype, self.device, self.trunk.widths)
        if self._reuse:
            self._room = room
        return room


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """View uint8 pixels (n, H, W, 3) as channels-last images (n, 3, H, W).

    Write to neither: the shared memory may belong to Ray's object store.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
