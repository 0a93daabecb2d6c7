"""Going on after the loss of a node: what was committed stays, the rest is done again."""

import logging
from collections.abc import Callable

from ray.exceptions import RayError, RayTaskError

from padim_ray.pipeline.lost_actors import giving_up_lost_actors

log = logging.getLogger("padim_ray")

MOST_ATTEMPTS = 5  # that end without any progress


def until_done(work: Callable[[], None], progress: Callable[[], int]) -> None:
    """Run a stage again for as long as the cluster fails it but it gets on.

    Ray itself replaces workers and computes lost blocks again. What it can't (blocks whose actors
    are gone, a node that dies between two stages) ends a stage with an error of Ray's.

    Args:
        work: does what isn't done yet.
        progress: how much is done.
    """
    idle, done = 0, progress()
    while True:
        try:
            with giving_up_lost_actors():
                return work()
        except RayError as error:
            idle = idle + 1 if progress() == done else 1
            if not is_cluster_failure(error) or idle == MOST_ATTEMPTS:
                raise
            done = progress()
            reason = str(error).strip().partition("\n")[0]
            log.warning("The cluster lost work (%s: %s); going on", type(error).__name__, reason)


def is_cluster_failure(error: RayError) -> bool:
    """Whether Ray failed, not the code that it ran."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)
