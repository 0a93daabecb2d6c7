"""Repeated measurements and their summaries."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Figure = dict[str, Any]
Value = TypeVar("Value")


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def clock() -> float:
    """A clock in seconds that excludes time that the hypervisor gave to other machines."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return time.perf_counter()
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    stolen = [int(fields[8]) for fields in map(str.split, lines) if fields[0] in mine]
    return time.perf_counter() - sum(stolen) / os.sysconf("SC_CLK_TCK") / len(mine)


def figure(stage: str, what: str, values: Sequence[float], unit: str) -> Figure:
    """One row of the report."""
    return {
        "stage": stage,
        "what": what,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "unit": unit,
    }


def steady_rate(sizes: tuple[int, int], seconds: tuple[float, float]) -> float:
    """Images/s without start-up, from the times of a small and a large set."""
    return (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])


def rates(
    stage: str, work: Mapping[str, Callable[[], int]], repeats: int, seconds: float = 0.3
) -> list[Figure]:
    """Images/s of each function, which returns the number of images that it processed.

    The functions take turns, so that changes of the machine's speed affect all of them.
    """
    measured: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        function()
    for _ in range(repeats):
        for name, function in work.items():
            started, images, spent = clock(), 0, 0.0
            while spent < seconds:
                images += function()
                spent = clock() - started
            measured[name].append(images / spent)
    return [figure(stage, name, values, "images/s") for name, values in measured.items()]


@contextmanager
def sample(measured: Callable[[], Iterable[Value]], every: float = 0.05) -> Iterator[list[Value]]:
    """Measure at the start and every `every` seconds while the block runs; yield the values."""
    values, stop = list(measured()), threading.Event()

    def repeat() -> None:
        while not stop.wait(every):
            values.extend(measured())

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()
