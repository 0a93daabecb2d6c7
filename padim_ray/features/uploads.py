"""Copy images to a GPU while it computes on earlier ones."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

AHEAD = 2  # batches that are copied while one is computed on
COPIERS = 4  # threads: a single one copies more slowly than a GPU embeds


class Uploader:
    """Copies batches to a GPU through pinned memory, a few ahead of the consumer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1)
        self._copiers = ThreadPoolExecutor(COPIERS)
        self._pinned: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield batches (B, 3, H, W) on the device; those that are there already aren't copied."""
        pending: deque[Future[tuple[torch.Tensor, torch.cuda.Event | None]]] = deque()
        computing = torch.cuda.current_stream(self._device)
        source = iter(batches)
        while True:
            while len(pending) <= AHEAD and (batch := next(source, None)) is not None:
                pending.append(self._worker.submit(self._upload, batch))
            if not pending:
                return
            batch, arrived = pending.popleft().result()
            if arrived is not None:
                computing.wait_event(arrived)
                batch.record_stream(computing)
            yield batch

    @torch.inference_mode()
    def _upload(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if batch.is_cuda:
            return batch, None
        memory = self._pinned_like(batch)
        pinned = memory[: len(batch)]
        parts = -(-len(batch) // COPIERS)
        list(self._copiers.map(_copy, pinned.split(parts), batch.split(parts)))
        with torch.cuda.stream(self._stream):
            uploaded = pinned.to(self._device, non_blocking=True)
            arrived = self._stream.record_event()
        self._pinned.append((memory, arrived))
        return uploaded, arrived

    def _pinned_like(self, batch: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a batch; reused if possible: allocating takes longer than copying."""
        if len(self._pinned) > AHEAD:
            memory, arrived = self._pinned.popleft()
            arrived.synchronize()
            if len(memory) >= len(batch) and _layout(memory) == _layout(batch):
                return memory
        return torch.empty_like(batch, pin_memory=True)


def _layout(images: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return images.dtype, images.shape[1:], images.stride()


@torch.inference_mode()  # threads don't inherit the mode
def _copy(target: torch.Tensor, images: torch.Tensor) -> None:
    target.copy_(images)
