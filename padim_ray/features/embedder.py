"""Images to embeddings: batches through the trunk, and its feature maps as cells."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
import torch

from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.trunk import CPU_PASS, GPU_PASS, Trunk
from padim_ray.features.uploads import Uploader
from padim_ray.features.workers import ONE_BY_ONE, Workers

GPU_BATCH = 1024  # images: enough for reading and writing a group's state not to dominate
CPU_BATCH = 128  # images, likewise


class Embedder:
    """A trunk and a grid: images to embeddings.

    Args:
        trunk: images to feature maps.
        grid: the levels' cells.
        device: the trunk's.
        pass_size: images per pass through the trunk. Default: as many as suit the device.
        workers: threads that embed images side by side.
        reuse: embeddings last only until the next ones are made, on CPUs in the same memory: memory
            that is freed and allocated again is cleared by the kernel.

    Attributes:
        batch_size: how many images are best embedded, and worked on further, by one call.
    """

    def __init__(
        self,
        trunk: Trunk,
        grid: PatchGrid,
        device: torch.device,
        pass_size: int | None = None,
        workers: Workers = ONE_BY_ONE,
        *,
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
        self._workers = workers
        self._reuse = reuse and device.type == "cpu"  # GPUs' memory is kept by PyTorch
        self._room: Embeddings | None = None

    def embed(self, images: torch.Tensor) -> Embeddings:
        """Images (B, 3, H, W), 0…255, to their features at all cells, on the device."""
        return next(self.embed_each([images]))

    def embed_each(self, batches: Iterable[torch.Tensor]) -> Iterator[Embeddings]:
        """Embed one batch after the other; to a GPU, the next are copied while it computes."""
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
            self.grid.nest(self.trunk(part), out)

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
    """(n, H, W, 3) uint8 pixels as channels-last images (n, 3, H, W), which share their memory.

    Write to neither: the memory may be the object store's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
