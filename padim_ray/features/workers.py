"""Threads that work on pieces of a batch side by side."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Workers:
    """Applies a function to pieces (images, or runs of cells) on several threads.

    Threads that each take whole pieces never wait for each other, as threads within an operator do
    after every operator.

    Args:
        threads: how many; PyTorch then has one thread in this process. Default: the pieces are
            worked on one after the other, with PyTorch's threads as they are set.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or 1
        self._pool = None
        if threads is not None:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        """The function's results, in the pieces' order."""
        if self._pool is None:
            return list(map(function, pieces))
        return list(self._pool.map(torch.inference_mode()(function), pieces))


ONE_BY_ONE = Workers()
