"""Processes on this machine, found by their session, which stays the same whoever dies first."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 120  # seconds for processes to start or to die


@dataclass(frozen=True)
class Process:
    """A process as it was found; it may have ended since."""

    pid: int
    title: str

    def kill(self) -> bool:
        """Kill it; return whether it was still running."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def list_processes(session: int) -> list[Process]:
    """The living processes of a session, with their titles."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.getsid(int(entry)) != session:
                continue
            title = Path("/proc", entry, "cmdline").read_bytes()
        except (ProcessLookupError, FileNotFoundError):
            continue
        if title:  # a zombie has none
            found.append(Process(int(entry), title.rstrip(b"\0").replace(b"\0", b" ").decode()))
    return found


def kill_session(session: int) -> None:
    """Kill a session's processes, including those that they start meanwhile."""

    def is_empty() -> bool:
        left = list_processes(session)
        for process in left:
            process.kill()
        return not left

    wait_until(is_empty, PATIENCE)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Raises: TimeoutError if the condition doesn't become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds} s: {condition}")
        time.sleep(0.05)


class Guard:
    """A process that ends sessions and removes a directory as soon as this process has ended.

    It does so even if this process is killed; otherwise a cluster would be left running.
    """

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as p; p.clean_up_at_end_of_input()"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._tell(directory)

    def watch(self, session: int) -> None:
        """Add a session to end."""
        self._tell(session)

    def _tell(self, what: object) -> None:
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)

    def clean_up(self) -> None:
        """Clean up now, and wait for it."""
        assert self._process.stdin
        self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError("some processes couldn't be ended")


def clean_up_at_end_of_input() -> None:
    """The guard's program: its input names the directory, then the sessions, one per line."""
    directory, *sessions = sys.stdin.read().splitlines()
    for session in sessions:
        kill_session(int(session))
    shutil.rmtree(directory, ignore_errors=True)
