"""An actor's groups: a bounded cache of fitted densities, the next group's loaded ahead."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from padim_ray.densities.base import Fitted


class DensityCache:
    """The densities of the groups used last, in a number of bytes.

    Where a group has few images, loading takes longer than scoring: while one group is scored, the
    next is loaded, if there is room for both.

    Args:
        load: reads a group's density.
        following: by group, the one that is asked for next, where that is as good as certain: a
            load for nothing takes the store's time.
        max_bytes: of densities, all of one size; one group's may always be there.

    Attributes:
        started: the groups whose loading began since this list was emptied, in order.
    """

    def __init__(
        self, load: Callable[[str], Fitted], following: Mapping[str, str], max_bytes: int
    ) -> None:
        self._load, self._max_bytes = load, max_bytes
        self._following = following
        self._loaded: OrderedDict[str, Fitted] = OrderedDict()  # the one used last is the last
        self._ahead: tuple[str, Future[Fitted]] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.started: list[str] = []

    def __getitem__(self, group: str) -> Fitted:
        """A group's density, from the cache or from storage.

        Raises:
            ModelError: if they can't be read.
        """
        self._take_ahead(group)
        if group not in self._loaded:
            self._make_room()
            self.started.append(group)
            self._loaded[group] = self._load(group)
        self._loaded.move_to_end(group)
        self._load_ahead(self._following.get(group))
        return self._loaded[group]

    def _take_ahead(self, group: str) -> None:
        """Keep what was loaded ahead, once it is asked for or there.

        If another group is needed first, it is waited for: two at once would take memory for both.
        """
        if self._ahead is None or (group in self._loaded and not self._ahead[1].done()):
            return
        (name, future), self._ahead = self._ahead, None
        if name == group or future.exception() is None:
            self._loaded[name] = future.result()

    def _load_ahead(self, group: str | None) -> None:
        if group is None or group in self._loaded or self._ahead is not None:
            return
        if 2 * self._size() <= self._max_bytes:
            while len(self._loaded) > 1 and not self._has_room():
                self._loaded.popitem(last=False)
            self.started.append(group)
            self._ahead = group, self._pool.submit(self._load, group)

    def _make_room(self) -> None:
        """Before loading, so that memory never holds more."""
        while self._loaded and not self._has_room():
            self._loaded.popitem(last=False)

    def _has_room(self) -> bool:
        return (len(self._loaded) + 1) * self._size() <= self._max_bytes

    def _size(self) -> int:
        return next(iter(self._loaded.values())).nbytes
