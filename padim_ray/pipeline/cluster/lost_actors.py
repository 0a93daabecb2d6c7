"""Give up actors that were lost with their node and that no other node has room for.

Ray restarts an actor of a lost node as soon as some node has room for it, and keeps the calls that
were sent to it. Without such a node they would wait forever, after the other actors have done
everything else. So the actor is killed for good and its stage fails; `recovery` then runs the stage
again on the nodes that are left.
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
PATIENCE = 30.0  # seconds without room; an actor that only crashed is restarted at once
POLL_SECONDS = 5.0


@contextmanager
def giving_up_lost_actors() -> Iterator[None]:
    """Watch the job's actors until the block ends."""
    if is_own_ray():  # the only node is this process's
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
    while not stopped.wait(POLL_SECONDS):
        try:
            now, lost = time.monotonic(), _homeless(job)
            since = {actor: since.get(actor, now) for actor in lost}
            for actor in [actor for actor, start in since.items() if now - start >= PATIENCE]:
                log.warning("No node has room for an actor of a lost node; its work starts again")
                kill_actor_for_good(actor)
                del since[actor]
        except (RayError, OSError, RuntimeError) as error:  # the job itself will fail
            log.debug("Watching actors failed: %s", error)


def _homeless(job: ray.JobID) -> list[str]:
    """IDs of the pools' actors that wait for a restart and have no process for it yet."""
    restarting = {
        actor: (state["Address"]["IPAddress"], state["Address"]["Port"])
        for actor, state in restarting_actors(job).items()
        if state["ActorClassName"].startswith(POOL_ACTOR)
    }
    if not restarting:
        return []
    # until an actor has a process, its address is that of the node that is to start one
    nodes = {(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}
    return [actor for actor, address in restarting.items() if not address[1] or address in nodes]
