"""An actor's cache of fitted densities, which loads the next group ahead."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from padim_ray.densities.base import Fitted


class DensityCache:
    """The densities of the groups that were used last, up to a number of bytes.

    If a group has few images, loading takes longer than scoring. So the next group is loaded while
    one is scored, if there is room for both.

    Args:
        load: reads a group's density.
        following: by group, the group that is nearly certain to be asked for next. A load in vain
            would burden the store.
        max_bytes: maximum size of the densities, which all have the same size. One density is
            always kept.

    Attributes:
        started: groups whose loading began, in order, since the caller last emptied this list.
    """

    def __init__(
        self, load: Callable[[str], Fitted], following: Mapping[str, str], max_bytes: int
    ) -> None:
        self._load, self._max_bytes = load, max_bytes
        self._following = following
        self._loaded: OrderedDict[str, Fitted] = OrderedDict()  # least recently used first
        self._ahead: tuple[str, Future[Fitted]] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.started: list[str] = []

    def __getitem__(self, group: str) -> Fitted:
        """A group's density, from the cache or from storage.

        Raises:
            ModelError: if it can't be read.
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
        """Move the density that was loaded ahead into the cache, once it is needed or loaded.

        If another group has to be loaded first, this waits for the one ahead: loading two at a time
        would exceed the memory.
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
        """Drop the least recently used densities before another one is loaded."""
        while self._loaded and not self._has_room():
            self._loaded.popitem(last=False)

    def _has_room(self) -> bool:
        return (len(self._loaded) + 1) * self._size() <= self._max_bytes

    def _size(self) -> int:
        return next(iter(self._loaded.values())).nbytes
