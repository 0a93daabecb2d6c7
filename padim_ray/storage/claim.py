"""Claims: only one job at a time writes to a directory.

.claims/
  000004.json    who holds the directory, or that nobody does; written once
  000004.beat    the holder's heartbeat

The highest number counts. A job takes the directory by creating the next number exclusively, so
only one of several jobs succeeds, and deletes the lower numbers before it starts to work. It gives
the directory back in the same way: the next number says that it is free. So no number is used
twice, and no job changes or deletes another's claim, however long it was stopped in between.

A claim without heartbeats lapses, and another job takes over. The old job may still be running, on
this machine or others. Therefore all of a job's processes read its claim before they write
(`Location.guard`): it is gone by the time at which another job starts to work.
"""

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from padim_ray.errors import PadimError
from padim_ray.storage.heartbeat import (
    Heartbeat,
    decode,
    describe_process,
    encode,
    find_living,
    lapse,
    lapse_of,
    show_process,
)
from padim_ray.storage.location import Location, list_numbers, numbered_file

log = logging.getLogger("padim_ray")
CHECKS = 60  # per lapse: how often a process reads its job's claim, at most
_checked: dict[str, float] = {}
"""When this process last found each job's claim in place."""


@contextmanager
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
    claim = _take(root, job)
    claim.remove_temporaries()  # of jobs that were killed
    claim.heartbeat.start()
    try:
        yield claim
    finally:
        claim.release()


@dataclass(frozen=True)
class Hold:
    """A claim as all of a job's processes know it.

    Attributes:
        directory: URI of the directory that is claimed.
        file: the claim.
        id: what tells it from any other.
        lapse: seconds without a heartbeat until it lapses.
    """

    directory: str
    file: Location
    id: str
    lapse: float

    def is_valid(self) -> bool:
        """Whether no other job took over, and this one hasn't given the directory back."""
        try:
            return decode(self.file.read()).get("id") == self.id
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Make sure that the job holds the directory, or did a moment ago.

        Raises:
            PadimError: if another job took over.
        """
        now = _now()
        if now - _checked.get(self.id, -self.lapse) < self.lapse / CHECKS:
            return
        if not self.is_valid():
            raise PadimError(f"Another job took over {self.directory}, so this one stops")
        _checked[self.id] = now


def _now() -> float:
    """Seconds that go on while the machine is suspended, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class Claim:
    """A claim that this job holds.

    Attributes:
        root: the directory, as the job uses it from now on: whatever is written below it checks
            the claim first, in any process, and temporary files are below `.staging`.
        hold: the claim.
        number: its number.
        heartbeat: shows other jobs that this one is alive.
        made_root: whether the directory was made for the claim.
    """

    root: Location
    hold: Hold
    number: int
    heartbeat: Heartbeat
    made_root: bool

    def check(self) -> None:
        """Make sure that this job holds the directory, or did a moment ago. Call it in loops.

        Raises:
            PadimError: if another job took over.
        """
        self.hold.check()

    def remove_temporaries(self) -> None:
        """Delete what killed writers left."""
        if self.root.staging:
            shutil.rmtree(self.root.staging, ignore_errors=True)
            with suppress(OSError):  # not there, or not empty: the run isn't complete
                os.rmdir(os.path.dirname(self.root.staging))

    def release(self) -> None:
        """Stop the heartbeat, and give the directory back."""
        self.heartbeat.stop()
        directory = claims_of(self.root)
        try:
            if not self.hold.is_valid():
                return
            self.remove_temporaries()
            if not (self.made_root and os.listdir(self.root.uri) == [directory.name]):
                free = {"id": secrets.token_hex(8), "free": True}
                with suppress(FileExistsError):  # another job took over
                    numbered_file(directory, self.number + 1).create(encode(free))
            _remove_before(directory, self.number + 1)
        except PadimError as error:  # the claim will lapse
            log.warning("%s", error)
        if self.made_root:
            with suppress(OSError):  # not empty: another claim, or results
                os.rmdir(directory.uri)
                os.rmdir(self.root.uri)


def claims_of(root: Location) -> Location:
    """The directory of a directory's claims; files are written there whoever holds it."""
    return Location(f"{root.uri}/.claims", root.options)


def await_end_of(job: str, root: Location) -> None:
    """Wait while a job of this name holds a directory."""
    directory = claims_of(root)
    while number := max(list_numbers(directory), default=0):
        holder = _read_claim(directory, number)
        if holder.get("job") != job or not _find_holder(root, directory, number):
            return
        time.sleep(min(1.0, lapse() / 10))


def _take(root: Location, job: str) -> Claim:
    """Create the next claim, when no living job holds the highest one."""
    directory, content = claims_of(root), describe_process(job)
    made_root = root.is_local and not os.path.exists(root.uri)
    while True:
        highest = max(list_numbers(directory), default=0)
        before = _read_claim(directory, highest) if highest else {"free": True}
        is_free = before.get("free") is True
        if not is_free:
            if holder := _find_holder(root, directory, highest):
                raise PadimError(
                    f"{root.uri} is being written by another {holder.get('job')} job: "
                    f"{show_process(holder)}"
                )
            if max(list_numbers(directory), default=0) != highest:
                continue  # the claim was given back or replaced meanwhile
        number = highest + 1
        file = numbered_file(directory, number)
        try:
            file.create(encode(content))
        except FileExistsError:
            continue  # another job was faster
        try:
            if max(list_numbers(directory), default=0) != number:
                file.remove()  # this job was stopped before it created the file, and overtaken
                continue
            _remove_before(directory, number)
            if not is_free:
                log.warning("%s is taken over from a job that is gone", root.uri)
                # by then each of its processes must look at its claim again before it writes
                time.sleep(2 * lapse_of(before) / CHECKS)
        except BaseException:
            file.remove()
            raise
        hold = Hold(root.uri, file, content["id"], content["lapse"])
        beat = directory / f"{number:06d}.beat"
        return Claim(
            root=replace(root, staging=_staging(root), guard=hold.check),
            hold=hold,
            number=number,
            heartbeat=Heartbeat(beat, content, goes_on=hold.is_valid),
            made_root=made_root,
        )


def _staging(root: Location) -> str | None:
    return f"{root.uri}/.staging/temporary" if root.is_local else None


def _read_claim(directory: Location, number: int) -> dict[str, Any]:
    try:
        return decode(numbered_file(directory, number).read())
    except FileNotFoundError:
        return {}


def _find_holder(root: Location, directory: Location, number: int) -> dict[str, Any] | None:
    """The living process that holds a claim; None if it is gone."""
    files = [numbered_file(directory, number), directory / f"{number:06d}.beat"]
    return find_living({number: files}, root.uri).get(number)


def _remove_before(directory: Location, number: int) -> None:
    """Delete claims and heartbeats of lower numbers."""
    for file in directory.list_files():
        found = re.fullmatch(r"([0-9]{6,9})\.(json|beat)", file.name)
        if found and int(found[1]) < number:
            file.remove()
