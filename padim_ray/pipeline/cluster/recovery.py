"""Run a stage again after the loss of a node: committed work stays, the rest is repeated."""

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ray.exceptions import OutOfDiskError, RayError, RayTaskError

from padim_ray.pipeline.cluster.lost_actors import giving_up_lost_actors

log = logging.getLogger("padim_ray")
MAX_ATTEMPTS = 5  # in a row without progress


def until_done(work: Callable[[], None], progress: Callable[[], int]) -> None:
    """Run a stage, and retry it after cluster failures as long as there is progress.

    Ray itself replaces workers and recomputes lost blocks. Losses that it can't repair end the
    stage with an error of Ray's: blocks whose actors are gone, or a node that dies between two
    stages. The stage's actors end with it, whatever the error.

    Args:
        work: does what isn't done yet.
        progress: returns how much is done.

    Raises:
        RayError: if the cluster failed `MAX_ATTEMPTS` times in a row without progress, or once
            because a disk is full; or if an error in the stage's own code ended it.
    """
    idle, done = 0, progress()
    while True:
        try:
            with _releasing_actors(), giving_up_lost_actors():
                return work()
        except RayError as error:
            idle = idle + 1 if progress() == done else 1
            is_hopeless = is_full_disk(error) and progress() == done
            if not is_cluster_failure(error) or is_hopeless or idle == MAX_ATTEMPTS:
                raise
            done = progress()
            reason = str(error).strip().partition("\n")[0]
            log.warning("The cluster lost work (%s: %s); continuing", type(error).__name__, reason)


@contextmanager
def _releasing_actors() -> Iterator[None]:
    """Drop all references to the actors of a stage that ends with an error.

    Ray ends an actor when the last reference to it is gone. The error's traceback keeps frames that
    refer to actors, and Ray Data makes reference cycles. Until the error is dropped and Python
    collects the cycles, the actors would hold their CPUs or GPUs, and the next stage might wait for
    these forever.

    An exception that the caller is handling keeps its frames.
    """
    callers_error = sys.exception()
    try:
        yield
    except BaseException as error:
        for each in _chain(error, callers_error):
            for frame, _ in traceback.walk_tb(each.__traceback__):
                for caller, _ in traceback.walk_stack(frame):
                    with suppress(RuntimeError):  # the frame is still running
                        caller.clear()
        gc.collect()
        raise


def _chain(error: BaseException | None, end: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts up to `end`: each of them keeps frames alive."""
    if error is not None and error is not end:
        yield error
        yield from _chain(error.__cause__, end)
        if error.__context__ is not error.__cause__:
            yield from _chain(error.__context__, end)


def is_cluster_failure(error: RayError) -> bool:
    """Whether Ray failed, and not the code that it ran."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)


def is_full_disk(error: BaseException) -> bool:
    """Whether objects couldn't be spilled: the disk of a node is full."""
    if isinstance(error, OutOfDiskError):
        return True
    return isinstance(error, RayTaskError) and is_full_disk(error.cause)
