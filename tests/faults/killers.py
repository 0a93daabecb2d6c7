"""Kill processes of a running job at random times, which a seed makes reproducible."""

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

MAX_RUN_SECONDS = 600  # seconds for one start of a driver


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
    """Kills processes of one kind inside the `with` block.

    It waits for a random time, then for a process of the kind, and kills it. A killed raylet's node
    is replaced by a new one.

    Attributes:
        cluster: the cluster.
        kind: the kind of process.
        seed: of the random times.
        pause: bounds of the random time, in seconds.
        most: maximum number of kills.
        kills: number of kills by kind.
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
    """One start of a driver: its exit code (negative: a signal), output and duration."""

    code: int
    output: str
    seconds: float


@dataclass
class DriverKiller:
    """Kills a driver several times, each at a random time after the job has made progress.

    One time in four it doesn't wait for progress, so that starts are interrupted as well.

    Attributes:
        progress: returns a number that grows with the job's work on storage.
        seed: of the random times.
        pause: bounds of the random time, in seconds.
        most: number of kills.
        number: the signal.
        kills: number of kills, under "driver".
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
        """Wait for a driver to end, and kill it if kills are left."""
        if self.kills.total() == self.most:
            driver.wait(MAX_RUN_SECONDS)
            return
        before, draw = self.progress(), self._random
        if draw.random() >= 0.25:
            _wait_for_any(driver, lambda: self.progress() > before)
        _wait_for_any(driver, _after(draw.uniform(*self.pause)))
        driver.send_signal(self.number)
        self.kills["driver"] += driver.wait(MAX_RUN_SECONDS) != 0  # 0: it ended before the kill


def run_until_done(
    cluster: Cluster,
    command: Sequence[str],
    directory: Path,
    *,
    killer: DriverKiller | None = None,
    starts: int = 1,
    environment: dict[str, str] | None = None,
) -> list[Start]:
    """Repeat a command until it exits with 0.

    Args:
        cluster: the cluster.
        command: the command.
        directory: where the output is written.
        killer: kills the command's processes.
        starts: maximum number of starts.
        environment: further variables of the first start.
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
                driver.wait(MAX_RUN_SECONDS)
        finally:
            kill_session(driver.pid)  # a hanging one would disturb the next test
        text = output.read_text(errors="replace")
        ended.append(Start(driver.returncode, text, time.monotonic() - since))
    return ended


def _wait_for_any(driver: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MAX_RUN_SECONDS
    while driver.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
