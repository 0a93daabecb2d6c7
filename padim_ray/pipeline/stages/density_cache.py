"""An actor's groups: a bounded cache of Gaussians, the next group's loaded ahead."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from padim_ray.densities.gaussian.whitening import Gaussian


class GaussianCache:
    """The Gaussians of the groups used last, in so many bytes.

    Where a group has few images, loading takes longer than scoring: while one group is scored, the
    next is on its way, if there is room for both.

    `started`: the groups whose loading began since this list was emptied, in that order.

    Args:
        load: reads a group's Gaussians.
        following: by group, the one that is asked for next, where that is as good as certain: what
            was loaded ahead for nothing took the store's time.
        most_bytes: of Gaussians, all of one size; but one group's may always be there.
    """

    def __init__(
        self, load: Callable[[str], Gaussian], following: Mapping[str, str], most_bytes: int
    ) -> None:
        self._load, self._most_bytes = load, most_bytes
        self._following = following
        self._loaded: OrderedDict[str, Gaussian] = OrderedDict()  # the one used last is the last
        self._ahead: tuple[str, Future[Gaussian]] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.started: list[str] = []

    def __getitem__(self, group: str) -> Gaussian:
        """A group's Gaussians, from the cache or from storage.

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
        if 2 * self._size() <= self._most_bytes:
            while len(self._loaded) > 1 and not self._has_room():
                self._loaded.popitem(last=False)
            self.started.append(group)
            self._ahead = group, self._pool.submit(self._load, group)

    def _make_room(self) -> None:
        """Before loading, so that memory never holds more."""
        while self._loaded and not self._has_room():
            self._loaded.popitem(last=False)

    def _has_room(self) -> bool:
        return (len(self._loaded) + 1) * self._size() <= self._most_bytes

    def _size(self) -> int:
        return next(iter(self._loaded.values())).nbytes
