"""Threads that process the pieces of a batch in parallel."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Workers:
    """Applies a function to pieces of a batch (images, or runs of cells) on several threads.

    PyTorch's own threads wait for each other after every operator; threads that process whole
    pieces don't.

    Args:
        threads: number of threads; PyTorch itself is then limited to one thread in this process.
            Default: process the pieces one after the other and leave PyTorch's threads alone.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or 1
        self._pool = None
        if threads is not None:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        """Apply the function to every piece; the results are in the pieces' order.

        An exception of the function is raised here.
        """
        if self._pool is None:
            return list(map(function, pieces))
        return list(self._pool.map(torch.inference_mode()(function), pieces))


ONE_BY_ONE = Workers()
