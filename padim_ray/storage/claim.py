"""Claims: only one job at a time writes to a directory.

.claims/
  000004.json    who holds the directory; rewritten every few seconds as a heartbeat

A job takes a claim by creating the next number exclusively, so only one of several jobs succeeds.
The highest number counts. A claim without heartbeats lapses: another job takes over by creating a
higher number, and the old job, if it is still running, notices and stops.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from padim_ray.errors import PadimError
from padim_ray.storage.location import Location, list_numbers, numbered_file

log = logging.getLogger("padim_ray")
BEAT = 10.0  # seconds between heartbeats
LAPSE = 60.0  # seconds without a heartbeat until a claim lapses


@contextlib.contextmanager
def claimed(root: Location, job: str) -> Iterator["Claim"]:
    """Hold a directory until the block ends.

    The claim of a job that was killed on this machine is taken over at once. On other machines
    nobody can see whether the job is alive, so its claim must lapse first.

    Args:
        root: the directory.
        job: the job's name, shown to other jobs that find the claim.

    Raises:
        PadimError: if another job holds the directory, or nothing can be written there.
    """
    directory = root / ".claims"
    content = {
        "id": secrets.token_hex(8),
        "job": job,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        **_this_process(),
    }
    made_root = root.is_local and not os.path.exists(root.uri)
    number = _take(root, directory, content)
    claim = Claim(root, directory, number, content, made_root)
    claim.start()
    try:
        yield claim
    finally:
        claim.release()


@dataclass
class Claim:
    """A claim that this job holds."""

    root: Location
    directory: Location
    number: int
    content: dict[str, Any]
    made_root: bool
    _lost: str | None = None
    _released: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def check(self) -> None:
        """Make sure that this job still holds the directory. Call it before publishing.

        Raises:
            PadimError: if another job took over.
        """
        self._look_for_successor()
        if self._lost:
            raise PadimError(self._lost)

    def start(self) -> None:
        """Start the heartbeats."""
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeats and delete the claim."""
        self._released.set()
        if self._thread:
            self._thread.join(BEAT)
        try:
            numbered_file(self.directory, self.number).remove()
        except PadimError as error:  # the claim will lapse
            log.warning("%s", error)
        if self.directory.is_local:
            with contextlib.suppress(OSError):  # not empty: another claim, or results
                os.rmdir(self.directory.uri)
                if self.made_root:
                    os.rmdir(self.root.uri)

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            try:
                self._look_for_successor()
                if self._lost:
                    log.error("%s", self._lost)
                    return
                if not self._released.is_set():
                    content = _encode(self.content | {"beat": beat})
                    numbered_file(self.directory, self.number).write(content)
            except PadimError as error:  # the next heartbeat may be in time
                log.warning("The claim on %s was not renewed: %s", self.root.uri, error)

    def _look_for_successor(self) -> None:
        highest = max(list_numbers(self.directory), default=0)
        if highest != self.number:
            self._lost = f"Another job took over {self.root.uri}, so this one stops"


def _take(root: Location, directory: Location, content: dict[str, Any]) -> int:
    while True:
        others = list_numbers(directory)
        if others and not _is_gone(root, numbered_file(directory, max(others))):
            continue  # the claim was released or replaced meanwhile
        number = max(others, default=0) + 1
        try:
            numbered_file(directory, number).create(_encode(content))
        except FileExistsError:
            continue  # another job was faster
        for lapsed in others:
            numbered_file(directory, lapsed).remove()
        return number


def _is_gone(root: Location, file: Location) -> bool:
    """Whether the job behind a claim is gone. False if the claim itself has disappeared.

    Raises:
        PadimError: if the job is alive.
    """
    start, first = time.monotonic(), None
    while True:
        try:
            data = file.read()
        except FileNotFoundError:
            return False
        holder = _decode(data)
        alive = _is_alive(holder)
        if alive is False:
            log.warning("The %s job that held %s is gone", holder.get("job"), root.uri)
            return True
        if alive or (first is not None and data != first):
            raise PadimError(
                f"{root.uri} is being written by another {holder.get('job')} job: process "
                f"{holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            )
        if first is None:
            first = data
            log.info(
                "%s may still be in use by a %s job on %s: waiting %.0f s for a heartbeat",
                *(root.uri, holder.get("job"), holder.get("host"), LAPSE),
            )
        if time.monotonic() - start > LAPSE:
            return True
        time.sleep(min(2.0, LAPSE / 10))


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, **_namespace(), **_start_time(pid)}


def _namespace() -> dict[str, str]:
    """Where process numbers are unique: this boot of the machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}  # not Linux: only heartbeats tell


def _start_time(pid: int) -> dict[str, str]:
    """When a process was started, because process numbers are reused. Empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {}
    return {} if fields[0] in "ZX" else {"birth": fields[19]}


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a claim's process is running; None if it can't be seen from this machine."""
    here = _namespace()
    if not here or any(holder.get(name) != value for name, value in here.items()):
        return None
    return _start_time(int(holder["pid"])).get("birth") == holder.get("birth")


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _decode(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
        int(content["pid"])
        return content
    except (ValueError, TypeError, KeyError):
        return {}  # damaged, or not a claim: it lapses
