"""Each kind of process's share of the cores while a job runs.

Unlike images/s, shares hardly depend on the processor's clock rate.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from benchmarks.timing import cores, sample

STEADY = (0.3, 0.8)  # measured part of the run, without its start and end
Snapshot = tuple[float, dict[int, tuple[str, float]]]
"""A time, and by process ID: the process's kind and its CPU seconds so far."""


@contextmanager
def shares(found: Counter[str]) -> Iterator[None]:
    """Fill `found` when the block ends; "idle" is the share that none of our processes used."""
    with sample(lambda: [snapshot()], every=1) as seen:
        yield
    first, last = (seen[int(part * len(seen))] for part in STEADY)
    seconds = last[0] - first[0]
    for pid, (kind, spent) in last[1].items():
        _, before = first[1].get(pid, (kind, 0.0))
        found[kind] += (spent - before) / seconds / cores()
    found["idle"] = 1 - sum(found.values())


def snapshot() -> Snapshot:
    """Take a snapshot of this process and its descendants."""
    me = psutil.Process()
    spent = {}
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):  # the process ended meanwhile
            times = process.cpu_times()
            spent[process.pid] = (kind_of(process), times.user + times.system)
    return time.perf_counter(), spent


def kind_of(process: psutil.Process) -> str:
    """The kind of a process by its title; Ray's workers are titled by their task, or `IDLE`."""
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
