"""What an actor does: images to embeddings by the trunk, and these to moments or distances."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

from padim_ray.densities.gaussian.leave_one_out import (
    NEGLIGIBLE_FROM,
    leave_one_out_squared_distances,
)
from padim_ray.densities.gaussian.moments import Moments, accumulate_
from padim_ray.densities.gaussian.whitening import Gaussian, squared_distances
from padim_ray.features.grid import Embeddings
from padim_ray.features.trunk import Trunk
from padim_ray.features.trunks.resnet_fused import TOGETHER
from padim_ray.features.uploads import Uploader
from padim_ray.features.weights import StateDict
from padim_ray.model.spec import ModelSpec

log = logging.getLogger("padim_ray")
GPU_BATCH = 256  # images per pass through the trunk: of fewer, launching kernels takes longer
GPU_TOGETHER = 1024  # images: enough for reading and writing a group's state not to dominate
CPU_TOGETHER = 128  # images, likewise
LEFT_OUT_TOGETHER = 8  # images: with 16, a tenth faster in twice the memory
Piece, Result = TypeVar("Piece"), TypeVar("Result")


class Embedder:
    """A trunk with its spec: images to embeddings, and these to moments or distances.

    Args:
        batch_size: images per pass through the trunk; default: as many as suit the device.
        threads: that work on pieces (images, or runs of cells) side by side; then PyTorch has one
            thread in this process. They never wait for each other, as threads within an operator
            do after every operator. Default: as PyTorch is set.
        reuse: whether embeddings last only until the next ones are made, on CPUs in the same
            memory: freed and had again, it is cleared by the kernel.

    `together`: how many images are best embedded, and summed up or measured, by one call.
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
        self.spec = spec
        self.device = torch.device(device)
        self._kernels = None
        if self.device.type == "cuda":
            self.batch_size = batch_size or GPU_BATCH
            self.together = max(1, GPU_TOGETHER // self.batch_size) * self.batch_size
            self._upload = Uploader(self.device)
            if spec.precision == "bfloat16":
                self._kernels = load_kernels(self.device)
        else:
            self.batch_size = batch_size or TOGETHER
            self.together = max(CPU_TOGETHER, self.batch_size)
        self.trunk = Trunk(
            spec.backbone,
            spec.channels,
            weights,
            precision=spec.precision,
            device=device,
            together=self.batch_size if self.device.type == "cuda" else TOGETHER,
            max_pool=self._kernels and self._kernels.max_pool,
        )
        self._reuse = reuse and self.device.type == "cpu"  # GPUs' memory is kept by PyTorch
        self._room: Embeddings | None = None
        self._pool = None
        if threads is not None:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def embed(self, images: torch.Tensor) -> Embeddings:
        """Images (B, 3, H, W), 0…255, to their features at all cells, on the device."""
        return next(self.embed_each([images]))

    def embed_each(self, batches: Iterable[torch.Tensor]) -> Iterator[Embeddings]:
        """Embed one batch after the other; to a GPU, the next are copied while it computes."""
        pending: deque[torch.Tensor] = deque()

        def parts() -> Iterator[torch.Tensor]:
            for images in batches:
                pending.append(images)
                yield from images.split(self.batch_size)

        arriving = parts() if self.device.type == "cpu" else self._upload(parts())
        for first in arriving:
            images = pending.popleft()
            number = max(1, -(-len(images) // self.batch_size))
            yield self._embed(len(images), chain([first], islice(arriving, number - 1)))

    @torch.inference_mode()
    def _embed(self, images: int, parts: Iterable[torch.Tensor]) -> Embeddings:
        embeddings = self._make_room(images)

        def embed(piece: tuple[torch.Tensor, Embeddings]) -> None:
            part, out = piece
            self.spec.grid.nest(self.trunk(part), out)

        self._each(embed, zip(parts, embeddings.split(self.batch_size), strict=True))
        return embeddings

    def _make_room(self, images: int) -> Embeddings:
        if self._room and images <= len(self._room):
            return self._room[:images]
        room = self.spec.grid.empty(images, self.trunk.dtype, self.device, self.trunk.widths)
        if self._reuse:
            self._room = room
        return room

    def load(self, group: Gaussian) -> Gaussian:
        """Bring a group's Gaussians to the device, as `distances` likes them best."""
        group = group.to(self.device)
        return self._kernels.fill_up(group) if self._kernels else group

    @torch.inference_mode()
    def accumulate_(self, moments: Moments, embeddings: Embeddings) -> Moments:
        """Add a batch of images, in place in the tensors of `moments`."""
        if self._kernels:
            return self._kernels.accumulate_(moments, embeddings)

        def accumulate(run: tuple[int, int]) -> None:
            accumulate_(moments.cells(*run), embeddings.patches(*run))

        self._each(accumulate, embeddings.runs())
        return replace(moments, count=moments.count + len(embeddings))

    @torch.inference_mode()
    def distances(
        self, embeddings: Embeddings, group: Gaussian, *, left_out_of: int | None = None
    ) -> torch.Tensor:
        """Mahalanobis distances (B, H_0, W_0).

        Args:
            left_out_of: the number of images in the Gaussians, if these are some of them and their
                distances are to be those to the Gaussians without the image itself.
        """

        if self._kernels and not left_out_of:
            squares = self._kernels.squared_distances(group, embeddings)
            return self.spec.grid.unnest(squares).sqrt_()

        def squared(cells: Gaussian, patches: Sequence[torch.Tensor]) -> torch.Tensor:
            if left_out_of:
                rule = self.spec.regularization
                return leave_one_out_squared_distances(cells, patches, left_out_of, rule)
            return squared_distances(cells, patches)

        if left_out_of and left_out_of < NEGLIGIBLE_FROM:  # what an image adds to R is of all cells
            parts = embeddings.split(LEFT_OUT_TOGETHER)
            pieces = self._each(lambda part: squared(group, part.patches()), parts)
            joined = torch.cat(pieces, 1)
        else:
            pieces = self._each(
                lambda run: squared(group.cells(*run), embeddings.patches(*run)), embeddings.runs()
            )
            joined = torch.cat(pieces)
        return self.spec.grid.unnest(joined).sqrt_()

    def _each(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        """Of each piece what the function makes of it, in order."""
        if self._pool is None:
            return list(map(function, pieces))
        return list(self._pool.map(torch.inference_mode()(function), pieces))


def load_kernels(device: torch.device) -> ModuleType | None:
    """The GPU's own kernels, if they can be compiled here: Triton wants a C compiler."""
    try:
        from padim_ray.densities.gaussian import kernels

        ones = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16, device=device)
        kernels.max_pool(ones.to(memory_format=torch.channels_last))
    except (ImportError, RuntimeError, OSError) as error:  # its cache may not be writable
        log.warning("Without Triton's kernels a GPU takes up to twice as long: %s", error)
        return None
    return kernels


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) uint8 pixels as channels-last images (n, 3, H, W), which share their memory.

    Write to neither: the memory may be the object store's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
