"""Processes on this machine, found by their session: whoever dies first, it stays the same."""

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
PATIENCE = 120  # seconds for processes to start, or to die


@dataclass(frozen=True)
class Process:
    """A process as it was seen; it may be gone."""

    pid: int
    title: str

    def kill(self) -> bool:
        """SIGKILL it; whether it was still there."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def list_processes(session: int) -> list[Process]:
    """The living processes of a session, by what they call themselves."""
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
    """SIGKILL a session's processes, and those that they start meanwhile."""

    def is_empty() -> bool:
        left = list_processes(session)
        for process in left:
            process.kill()
        return not left

    wait_until(is_empty, PATIENCE)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Raises: TimeoutError if it doesn't come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s it still isn't so: {condition}")
        time.sleep(0.05)


class Guard:
    """A process that ends sessions and removes a directory, as soon as this process is gone.

    Also when this one is killed: nobody else would stop a cluster then.
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
        """End this session, too."""
        self._tell(session)

    def _tell(self, what: object) -> None:
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)

    def clean_up(self) -> None:
        """Do it now, and wait until it is done."""
        assert self._process.stdin
        self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError("some processes couldn't be ended")


def clean_up_at_end_of_input() -> None:
    """What the guard runs: lines of input name the directory, then sessions."""
    directory, *sessions = sys.stdin.read().splitlines()
    for session in sessions:
        kill_session(int(session))
    shutil.rmtree(directory, ignore_errors=True)
