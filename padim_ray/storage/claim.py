"""One job at a time below a directory: a claim on it, which lapses when its job is gone.

.claims/
  000004.json    who holds the directory; rewritten every few seconds as a sign of life

A claim is taken by creating the next number exclusively, so of two who try one succeeds. The
highest number counts: whoever takes over from a job that is gone only creates a higher one, and
the job, should it still be there, finds out and stops.
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
BEAT = 10.0  # seconds between signs of life
LAPSE = 60.0  # without one, after which the job counts as gone


@contextlib.contextmanager
def claimed(root: Location, job: str) -> Iterator["Claim"]:
    """Hold a directory for as long as the block lasts.

    If the job that holds it was killed on this machine, it is known to be gone; elsewhere it takes
    `LAPSE` without a sign of life.

    Args:
        job: what is done there, for whoever finds the claim.

    Raises:
        PadimError: if another job holds it, or if nothing can be written there.
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
    """A directory that this job holds."""

    root: Location
    directory: Location
    number: int
    content: dict[str, Any]
    made_root: bool
    _lost: str | None = None
    _released: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def check(self) -> None:
        """Make sure that it is still this job's, before something is published.

        Raises:
            PadimError: if another job took over.
        """
        self._look()
        if self._lost:
            raise PadimError(self._lost)

    def start(self) -> None:
        """Give signs of life from now on."""
        self._thread = threading.Thread(target=self._live, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have the directory."""
        self._released.set()
        if self._thread:
            self._thread.join(BEAT)
        try:
            numbered_file(self.directory, self.number).remove()
        except PadimError as error:  # it lapses
            log.warning("%s", error)
        if self.directory.is_local:
            with contextlib.suppress(OSError):  # another's claim may be there, or results
                os.rmdir(self.directory.uri)
                if self.made_root:
                    os.rmdir(self.root.uri)

    def _live(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            try:
                self._look()
                if self._lost:
                    log.error("%s", self._lost)
                    return
                if not self._released.is_set():
                    content = _encode(self.content | {"beat": beat})
                    numbered_file(self.directory, self.number).write(content)
            except PadimError as error:  # the next may succeed; until then others may take over
                log.warning("No sign of life could be given: %s", error)

    def _look(self) -> None:
        highest = max(list_numbers(self.directory), default=0)
        if highest != self.number:
            self._lost = f"Another job took over {self.root.uri}, so this one stops"


def _take(root: Location, directory: Location, content: dict[str, Any]) -> int:
    while True:
        others = list_numbers(directory)
        if others and not _is_gone(root, numbered_file(directory, max(others))):
            continue  # it was released, or replaced: look again
        number = max(others, default=0) + 1
        try:
            numbered_file(directory, number).create(_encode(content))
        except FileExistsError:
            continue  # somebody was faster
        for lapsed in others:
            numbered_file(directory, lapsed).remove()
        return number


def _is_gone(root: Location, file: Location) -> bool:
    """Whether the job behind a claim is gone; false if the claim is.

    Raises:
        PadimError: if the job is alive.
    """
    watched_since, first = time.monotonic(), None
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
                "%s may still be written by a %s job on %s: watching for signs of life for %.0f s",
                *(root.uri, holder.get("job"), holder.get("host"), LAPSE),
            )
        if time.monotonic() - watched_since > LAPSE:
            return True
        time.sleep(min(2.0, LAPSE / 10))


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), **_namespace(), **_birth(os.getpid())}


def _namespace() -> dict[str, str]:
    """What process numbers are valid in: this boot of this machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}  # not Linux: signs of life tell


def _birth(pid: int) -> dict[str, str]:
    """When a process was started: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {}
    return {} if fields[0] in "ZX" else {"birth": fields[19]}


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a claim's process lives; None if that can't be seen from here."""
    here = _namespace()
    if not here or any(holder.get(name) != value for name, value in here.items()):
        return None
    return _birth(int(holder["pid"])).get("birth") == holder.get("birth")


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _decode(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
        int(content["pid"])
        return content
    except (ValueError, TypeError, KeyError):
        return {}  # not ours, or damaged: it lapses
