"""An actor's groups: a bounded cache of Gaussians, the next group's loaded ahead."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

from padim_ray.gaussian import Gaussian


class GaussianCache:
    """The Gaussians of the groups used last.

    Where a group has few images, loading takes longer than scoring: while one group is scored, the
    next is on its way.

    Args:
        load: reads a group's Gaussians.
        order: in which groups are likely to be asked for.
        most_bytes: of Gaussians, all of one size; but one group's may always be there.
    """

    def __init__(
        self, load: Callable[[str], Gaussian], order: Sequence[str], most_bytes: int
    ) -> None:
        self._load, self._most_bytes = load, most_bytes
        self._following = dict(pairwise(order))
        self._loaded: OrderedDict[str, Gaussian] = OrderedDict()
        self._ahead: tuple[str, Future[Gaussian]] | None = None
        self._pool = ThreadPoolExecutor(1)

    def __getitem__(self, group: str) -> Gaussian:
        """A group's Gaussians, from the cache or from storage.

        Raises:
            ModelError: if they can't be read.
        """
        if group not in self._loaded:
            self._make_room()
            self._loaded[group] = self._take_ahead(group) or self._load(group)
        self._loaded.move_to_end(group)
        self._load_ahead(self._following.get(group))
        return self._loaded[group]

    def _take_ahead(self, group: str) -> Gaussian | None:
        """What was loaded ahead, if it is this; anything else is given up."""
        if self._ahead is None:
            return None
        (name, future), self._ahead = self._ahead, None
        if name == group:
            return future.result()
        if not future.cancel():
            future.exception()  # waits: two at once would take memory for both
        return None

    def _load_ahead(self, group: str | None) -> None:
        if group is None or group in self._loaded or self._ahead is not None:
            return
        if 2 * self._size() <= self._most_bytes:
            while len(self._loaded) > 1 and not self._has_room():
                self._loaded.popitem(last=False)
            self._ahead = group, self._pool.submit(self._load, group)

    def _make_room(self) -> None:
        """Before loading, so that memory never holds more."""
        while self._loaded and not self._has_room():
            self._loaded.popitem(last=False)

    def _has_room(self) -> bool:
        return (len(self._loaded) + 1) * self._size() <= self._most_bytes

    def _size(self) -> int:
        return next(iter(self._loaded.values())).nbytes
