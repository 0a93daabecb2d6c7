"""What kills processes of a running job, at random times that a seed fixes."""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.faults.cluster import Cluster
from tests.faults.processes import Process, kill_session

Kind = Literal["actor", "worker", "raylet"]

LONGEST_RUN = 600  # seconds for one start of a driver


def find_victims(cluster: Cluster, kind: Kind) -> list[Process]:
    """The processes of a kind that are running on the cluster's worker nodes."""
    running = [node for node in cluster.nodes if node.is_running]
    return [
        process
        for node in running
        for process in {
            "actor": node.actors,
            "worker": node.task_workers,
            "raylet": node.raylets,
        }[kind]()
    ]


@dataclass
class Killer:
    """Kills processes of a kind from `with` to the end of the block.

    `pause`: it waits for a random time between these two numbers of seconds, then for a process of
    the kind, and kills it. `most`: kills at most. `kills` counts them, by kind.

    When it kills a raylet, a new node joins the cluster.
    """

    cluster: Cluster
    kind: Kind
    seed: int
    pause: tuple[float, float]
    most: int
    kills: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Killer":
        self._random, self._stopped = random.Random(self.seed), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while self.kills.total() < self.most:
            self._await_victims()
            if self._stopped.wait(self._random.uniform(*self.pause)):
                return
            victims = self._await_victims()
            if self._stopped.is_set():
                return
            if self._random.choice(victims).kill():
                self.kills[self.kind] += 1
                if self.kind == "raylet":
                    self.cluster.restore()

    def _await_victims(self) -> list[Process]:
        while not (victims := find_victims(self.cluster, self.kind)):
            if self._stopped.wait(0.05):
                break
        return victims


@dataclass(frozen=True)
class Start:
    """One start of a driver: how it ended (a signal is negative), and what it printed."""

    code: int
    output: str
    seconds: float


@dataclass
class DriverKiller:
    """Kills a driver `most` times, each at a random time after there is new progress.

    `progress`: a number that grows with the job's work on storage. One time in four it isn't waited
    for, so that beginnings are interrupted, too. `pause`: between these two numbers of seconds.
    """

    progress: Callable[[], int]
    seed: int
    pause: tuple[float, float]
    most: int
    number: signal.Signals = signal.SIGKILL
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def watch(self, driver: subprocess.Popen) -> None:
        """Wait for a driver, and kill it meanwhile or not."""
        if self.kills.total() == self.most:
            driver.wait(LONGEST_RUN)
            return
        before, draw = self.progress(), self._random
        if draw.random() >= 0.25:
            _wait_for_any(driver, lambda: self.progress() > before)
        _wait_for_any(driver, _after(draw.uniform(*self.pause)))
        driver.send_signal(self.number)
        self.kills["driver"] += driver.wait(LONGEST_RUN) != 0  # else it was done before


def run_until_done(
    cluster: Cluster,
    command: Sequence[str],
    directory: Path,
    *,
    killer: DriverKiller | None = None,
    starts: int = 1,
    environment: dict[str, str] | None = None,
) -> list[Start]:
    """Start a command again and again until it exits with 0.

    Args:
        directory: for what the starts print.
        starts: how many there are at most.
        environment: of the first start only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ended: list[Start] = []
    while len(ended) < starts and not (ended and ended[-1].code == 0):
        output, since = directory / f"start-{len(ended):02d}.log", time.monotonic()
        driver = cluster.start_driver(list(command), output, environment if not ended else None)
        try:
            if killer:
                killer.watch(driver)
            else:
                driver.wait(LONGEST_RUN)
        finally:
            kill_session(driver.pid)  # one that hangs doesn't disturb the next test
        text = output.read_text(errors="replace")
        ended.append(Start(driver.returncode, text, time.monotonic() - since))
    return ended


def _wait_for_any(driver: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_RUN
    while driver.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
