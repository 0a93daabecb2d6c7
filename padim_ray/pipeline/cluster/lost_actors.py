"""Giving up actors that were lost with their node and for which there is no room elsewhere.

Ray restarts an actor of a lost node as soon as some node has room for it, and keeps the calls that
it had for it. Without such a node they would wait forever, while the other actors have nothing left
to do. Killed for good, it fails its stage instead, which `recovery` then does on the nodes that are
left.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from padim_ray.pipeline.cluster.ray_internals import (
    POOL_ACTOR,
    kill_actor_for_good,
    restarting_actors,
)
from padim_ray.pipeline.cluster.session import is_own_ray

log = logging.getLogger("padim_ray")
PATIENCE = 30.0  # seconds without room: a process that crashed is restarted where it was, at once
PAUSE = 5.0


@contextmanager
def giving_up_lost_actors() -> Iterator[None]:
    """Watch the job's actors until the block ends."""
    if is_own_ray():  # its only node is this process's
        yield
        return
    stopped = threading.Event()
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    thread = threading.Thread(target=_watch, args=(job, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _watch(job: ray.JobID, stopped: threading.Event) -> None:
    since: dict[str, float] = {}
    while not stopped.wait(PAUSE):
        try:
            now, lost = time.monotonic(), _homeless(job)
            since = {actor: since.get(actor, now) for actor in lost}
            for actor in [actor for actor, start in since.items() if now - start >= PATIENCE]:
                log.warning("There is no room for an actor of a lost node; its work is done again")
                kill_actor_for_good(actor)
                del since[actor]
        except (RayError, OSError, RuntimeError) as error:  # the job itself will notice
            log.debug("Actors can't be watched: %s", error)


def _homeless(job: ray.JobID) -> list[str]:
    """IDs of the pools' actors that are to be restarted and have no process for it yet."""
    restarting = {
        actor: (told["Address"]["IPAddress"], told["Address"]["Port"])
        for actor, told in restarting_actors(job).items()
        if told["ActorClassName"].startswith(POOL_ACTOR)
    }
    if not restarting:
        return []
    # until it has a process, its address is that of a node which was asked for one
    nodes = {(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}
    return [actor for actor, address in restarting.items() if not address[1] or address in nodes]
