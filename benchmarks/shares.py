"""Who has the cores while a job runs: shares by kind of process.

Unlike images/s, they hardly depend on a clock that changes.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from benchmarks.timing import cores, sample

STEADY = (0.3, 0.8)  # of the time: neither the start nor the end
Snapshot = tuple[float, dict[int, tuple[str, float]]]
"""When, and by process ID: its kind, and the CPU seconds that it has had."""


@contextmanager
def shares(found: Counter[str]) -> Iterator[None]:
    """Fill `found` when the block is left; what no process of this one's has had is "idle"."""
    with sample(lambda: [snapshot()], every=1) as seen:
        yield
    first, last = (seen[int(part * len(seen))] for part in STEADY)
    seconds = last[0] - first[0]
    for pid, (kind, spent) in last[1].items():
        _, before = first[1].get(pid, (kind, 0.0))
        found[kind] += (spent - before) / seconds / cores()
    found["idle"] = 1 - sum(found.values())


def snapshot() -> Snapshot:
    """Of this process and all below it."""
    me = psutil.Process()
    spent = {}
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):  # it ended meanwhile
            times = process.cpu_times()
            spent[process.pid] = (kind_of(process), times.user + times.system)
    return time.perf_counter(), spent


def kind_of(process: psutil.Process) -> str:
    """What a process does, by its title: a worker's is that of its task, or `IDLE`."""
    title = " ".join(process.cmdline())
    if process.pid == os.getpid():
        return "driver"
    if "padim_ray.images.child" in title:
        return "decoders"
    if "MapWorker" in title:
        return "actor"
    if "MapBatches" in title or "IDLE" in title:
        return "tasks: fetching, writing"
    return "Ray's own processes"
