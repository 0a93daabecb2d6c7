"""Going on after the loss of a node: what was committed stays, the rest is done again."""

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ray.exceptions import RayError, RayTaskError

from padim_ray.pipeline.cluster.lost_actors import giving_up_lost_actors

log = logging.getLogger("padim_ray")
MOST_ATTEMPTS = 5  # that end without any progress


def until_done(work: Callable[[], None], progress: Callable[[], int]) -> None:
    """Run a stage again for as long as the cluster fails it but it gets on.

    Ray itself replaces workers and computes lost blocks again. What it can't (blocks whose actors
    are gone, a node that dies between two stages) ends a stage with an error of Ray's. Whatever
    error ends it, its actors end as well.

    Args:
        work: does what isn't done yet.
        progress: how much is done.
    """
    idle, done = 0, progress()
    while True:
        try:
            with _releasing_actors(), giving_up_lost_actors():
                return work()
        except RayError as error:
            idle = idle + 1 if progress() == done else 1
            if not is_cluster_failure(error) or idle == MOST_ATTEMPTS:
                raise
            done = progress()
            reason = str(error).strip().partition("\n")[0]
            log.warning("The cluster lost work (%s: %s); going on", type(error).__name__, reason)


@contextmanager
def _releasing_actors() -> Iterator[None]:
    """Drop all references to the actors of a stage that ends with an error.

    What the caller was handling when it began the stage is left as it is.

    Ray ends an actor when nothing refers to it any more. The frames that the error's traceback
    keeps do, and so do cycles of Ray Data's. Until somebody forgets the error, and Python happens
    to look for cycles, they would hold their CPUs or GPUs: the next stage may wait for these
    forever.
    """
    callers_error = sys.exception()
    try:
        yield
    except BaseException as error:
        for each in _chain(error, callers_error):
            for frame, _ in traceback.walk_tb(each.__traceback__):
                for caller, _ in traceback.walk_stack(frame):
                    with suppress(RuntimeError):  # it goes on
                        caller.clear()
        gc.collect()
        raise


def _chain(error: BaseException | None, end: BaseException | None) -> Iterator[BaseException]:
    """All errors that lead to this one: any of them keeps frames, not only causes."""
    if error is not None and error is not end:
        yield error
        yield from _chain(error.__cause__, end)
        if error.__context__ is not error.__cause__:
            yield from _chain(error.__context__, end)


def is_cluster_failure(error: RayError) -> bool:
    """Whether Ray failed, not the code that it ran."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)
