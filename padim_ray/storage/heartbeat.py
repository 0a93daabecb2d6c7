"""Signs of life: files by which jobs see, over shared storage, that others are at work.

A job describes its process in a file, and a heartbeat rewrites a file every few seconds. A process
of this machine is looked up, where the system shows it. Of any other process only the heartbeat
tells: when it has stopped for `lapse()` seconds, the process counts as gone.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from padim_ray.errors import PadimError
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
LAPSE = 60.0  # seconds without a heartbeat, unless PADIM_RAY_LAPSE_SECONDS is set
BEATS = 6  # per lapse
MAX_LAPSE = 3600.0  # seconds, whatever another job's file says
K = TypeVar("K", bound=Hashable)


def lapse() -> float:
    """How long a heartbeat may stop before its process counts as gone, in seconds."""
    return float(os.environ.get("PADIM_RAY_LAPSE_SECONDS", LAPSE))


def describe_process(job: str) -> dict[str, Any]:
    """Describe this process, for others to find it, and its job, for people."""
    pid = os.getpid()
    return {
        "id": secrets.token_hex(8),
        "job": job,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "lapse": lapse(),
        "host": socket.gethostname(),
        "pid": pid,
        **_namespace(),
        **({"birth": birth} if (birth := _birth(pid)) else {}),
    }


def show_process(process: Mapping[str, Any]) -> str:
    """Name a process that `find_living` found."""
    return f"process {process.get('pid')} on {process.get('host')}, since {process.get('since')}"


def lapse_of(process: Mapping[str, Any]) -> float:
    """The lapse that a process goes by, as its description says."""
    named = process.get("lapse")
    return min(named, MAX_LAPSE) if isinstance(named, int | float) else lapse()


def encode(content: Mapping[str, Any]) -> bytes:
    """Encode a description."""
    return json.dumps(content, indent=1).encode()


def decode(data: bytes) -> dict[str, Any]:
    """Decode a description; anything else gives an empty one."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


class Heartbeat:
    """Rewrites a file every few seconds, from `start` to `stop`.

    Args:
        file: the file.
        content: its content, besides the number of the beat.
        goes_on: asked before each beat; the heartbeat ends when it returns False.
    """

    def __init__(
        self, file: Location, content: Mapping[str, Any], goes_on: Callable[[], bool] = lambda: True
    ) -> None:
        self._file, self._content, self._goes_on = file, content, goes_on
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat, and wait a while for a beat that is under way."""
        self._stopped.set()
        self._thread.join(lapse() / BEATS)

    def _beat(self) -> None:
        beat = 0
        while not self._stopped.wait(lapse() / BEATS):
            beat += 1
            try:
                if not self._goes_on():
                    return
                if not self._stopped.is_set():
                    self._file.write(encode({**self._content, "beat": beat}))
            except PadimError as error:  # the next heartbeat may be in time
                log.warning("A heartbeat failed: %s", error)


def find_living(signs: Mapping[K, Sequence[Location]], where: str) -> dict[K, dict[str, Any]]:
    """Find the processes that are alive. This takes up to `lapse()` if it needs heartbeats.

    Args:
        signs: by key, the files of a process: its description, and what its heartbeat rewrites if
            that is another file. A process whose description is gone has ended.
        where: the directory that they use, for the log.

    Returns:
        Descriptions of those that are alive.
    """
    waiting, first, found = dict(signs), dict[K, list[bytes]](), dict[K, dict[str, Any]]()
    start = time.monotonic()
    while True:
        now = time.monotonic()  # before reading: this process may be stopped, too
        for key, files in list(waiting.items()):
            data = [_read(file) for file in files]
            process, is_new = decode(data[0]), key not in first
            if not data[0] or _is_alive(process) is False:
                del waiting[key]
            elif _is_alive(process) or data != first.setdefault(key, data):
                del waiting[key]
                found[key] = process
            elif now - start > lapse_of(process):
                del waiting[key]
            elif is_new:
                log.info(
                    "%s may still be in use by a %s job on %s: waiting %.0f s for a heartbeat",
                    *(where, process.get("job"), process.get("host"), lapse_of(process)),
                )
        if not waiting:
            return found
        time.sleep(min(2.0, lapse() / 10))


def _read(file: Location) -> bytes:
    with suppress(FileNotFoundError):
        return file.read()
    return b""


def _namespace() -> dict[str, str]:
    """Where process numbers are unique: this boot of the machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}  # not Linux: only heartbeats tell


def _birth(pid: int) -> str | None:
    """When a process was started, because process numbers are reused.

    Empty if it has ended and its parent hasn't noticed; None if the system doesn't show it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process is running; None if that can't be seen from here."""
    here, pid, born = _namespace(), process.get("pid"), process.get("birth")
    if not here or any(process.get(name) != value for name, value in here.items()):
        return None
    if type(pid) is not int or not 0 < pid < 2**31:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there is a process with this number, of another user
    # with /proc mounted with hidepid, other users' processes don't show when they were started
    birth = _birth(pid)
    return None if birth is None or born is None else birth == born
