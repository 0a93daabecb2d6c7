"""Say whether a job's objects fit into the object stores and on disk, and explain if they don't."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from padim_ray.errors import PadimError
from padim_ray.pipeline.cluster.recovery import is_full_disk
from padim_ray.pipeline.cluster.session import is_own_ray
from padim_ray.planning.spilling import MAKE_ROOM, spill_directory, warn_of_spilling
from padim_ray.storage.disk import format_size

log = logging.getLogger("padim_ray")


@contextmanager
def spilling(at_once: int) -> Iterator[None]:
    """Warn at a job's start that its objects may not fit, and turn a full disk into a sentence.

    Nobody can see the disks of a cluster's other nodes without a task on each of them, so there the
    job only says how much may be spilled.

    Args:
        at_once: bytes of the job's objects at the same time, see `Forecast.object_store_at_once`.

    Raises:
        PadimError: if the block ends because a disk is full.
    """
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    if is_own_ray():
        if warning := warn_of_spilling(at_once, store):
            log.warning("This job %s", warning)
    elif at_once > store:
        log.info(
            "This job has up to %s of objects at once, and the nodes' object stores hold %s: the "
            "rest is spilled to the nodes' disks",
            *(format_size(at_once), format_size(store)),
        )
    try:
        yield
    except RayError as error:
        if not is_full_disk(error):
            raise
        raise PadimError(_explain(error, at_once, store)) from None


def _explain(error: RayError, at_once: int, store: int) -> str:
    sizes = (
        f"This job has up to {format_size(at_once)} of objects at once, for an object store of "
        f"{format_size(store)}"
    )
    if is_own_ray():
        return (
            f"The disk of {spill_directory()} is full, so Ray can't spill objects to it. {sizes}. "
            f"{MAKE_ROOM}; the same command continues"
        )
    found = re.search(r"\bip=([0-9a-fA-F.:]+)", str(error))  # in the description of the task
    node = f"node {found[1]}" if found else "a node"
    return (
        f"The disk of {node} is full, so Ray can't spill objects to it. {sizes} on all nodes. Make "
        "room in Ray's session directory there (/tmp/ray), or start the nodes with "
        "--object-spilling-directory on a larger disk; the same command continues"
    )
