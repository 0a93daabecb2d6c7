"""Readers' leases: `prune` keeps the versions that jobs read.

MODEL/.readers/
  000003-0123456789abcdef.json    a job that reads version 3; rewritten as its heartbeat

A reader writes its lease, and then waits while `prune` is at work. `prune` claims the model, and
then looks for leases. So one of the two always sees the other.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from padim_ray.errors import PadimError
from padim_ray.model.layout import check_number
from padim_ray.model.version import ModelVersion
from padim_ray.storage.claim import await_end_of
from padim_ray.storage.heartbeat import Heartbeat, describe_process, encode, find_living
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
PRUNE = "prune"  # name of the job
_LEASE = re.compile(r"([0-9]{6,9})-[0-9a-f]{16}\.json")


@contextmanager
def reading(version: ModelVersion, job: str) -> Iterator[None]:
    """Keep `prune` from deleting a version, until the block ends.

    Where nothing may be written to the model, the version isn't protected; this is logged.

    Args:
        version: the version.
        job: name of the job that reads it.

    Raises:
        ModelError: if the version has been deleted meanwhile.
    """
    root, process = version.root, describe_process(job)
    lease = _readers(root) / f"{version.number:06d}-{process['id']}.json"
    try:
        _check_writable(root)
        lease.write(encode(process))
    except PadimError as error:
        log.info("%s isn't protected from `prune` while it is read: %s", version.name, error)
        yield
        return
    heartbeat = Heartbeat(lease, process)
    heartbeat.start()
    try:
        await_end_of(PRUNE, root)
        check_number(root, version.number)
        yield
    finally:
        heartbeat.stop()
        _remove(lease)


def find_readers(root: Location) -> dict[int, dict[str, Any]]:
    """Find the versions that living jobs read, and delete the leases of jobs that are gone.

    Returns:
        By version, the description of one of the jobs that read it.
    """
    leases = {
        file.name: file for file in _readers(root).list_files() if _LEASE.fullmatch(file.name)
    }
    living = find_living({name: [file] for name, file in leases.items()}, root.uri)
    for name in leases.keys() - living.keys():
        leases[name].remove()
    return {int(name.partition("-")[0]): process for name, process in living.items()}


def _readers(root: Location) -> Location:
    return Location(f"{root.uri}/.readers", root.options)


def _check_writable(root: Location) -> None:
    """Raises: PadimError for a web server, or if a link leads out of the model's directory."""
    if root.uri.startswith(("http://", "https://")):
        raise PadimError(f"{root.uri} can only be read")  # fsspec would send the lease to it
    directory = _readers(root)
    inside = os.path.join(os.path.realpath(root.uri), directory.name)
    if root.is_local and os.path.realpath(directory.uri) != inside:
        raise PadimError(f"{directory.uri} is a link")


def _remove(lease: Location) -> None:
    try:
        lease.remove()
    except PadimError as error:  # it will lapse
        log.warning("%s", error)
    if lease.is_local:
        with suppress(OSError):  # not empty: other jobs' leases
            os.rmdir(os.path.dirname(lease.uri))
