"""Images on their way to a GPU while it computes on those before."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

AHEAD = 2  # batches that are on their way while one is computed on
COPIERS = 4  # threads: one alone copies more slowly than a GPU embeds


class Uploader:
    """Copies batches through pinned memory, a few ahead of who asks for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1)
        self._copiers = ThreadPoolExecutor(COPIERS)
        self._pinned: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Batches (B, 3, H, W) of the host's memory, or the device's, on the device."""
        under_way: deque[Future[tuple[torch.Tensor, torch.cuda.Event | None]]] = deque()
        computing = torch.cuda.current_stream(self._device)
        waiting = iter(batches)
        while True:
            while len(under_way) <= AHEAD and (batch := next(waiting, None)) is not None:
                under_way.append(self._worker.submit(self._upload, batch))
            if not under_way:
                return
            batch, arrived = under_way.popleft().result()
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
            there = pinned.to(self._device, non_blocking=True)
            arrived = self._stream.record_event()
        self._pinned.append((memory, arrived))
        return there, arrived

    def _pinned_like(self, batch: torch.Tensor) -> torch.Tensor:
        """Pinned memory of the same layout that is free: making some takes longer than copying."""
        if len(self._pinned) > AHEAD:
            memory, arrived = self._pinned.popleft()
            arrived.synchronize()
            if len(memory) >= len(batch) and _layout(memory) == _layout(batch):
                return memory
        return torch.empty_like(batch, pin_memory=True)


def _layout(images: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return images.dtype, images.shape[1:], images.stride()


@torch.inference_mode()  # of a thread: it isn't inherited
def _copy(there: torch.Tensor, images: torch.Tensor) -> None:
    there.copy_(images)
