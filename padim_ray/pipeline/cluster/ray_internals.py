"""All uses of Ray's private API.

pyproject.toml pins Ray to the minor versions that this was tested with, and
`tests/pipeline/test_ray_internals.py` shows what a new version breaks.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray._private.state import actors
from ray._private.worker import global_worker

POOL_ACTOR = "MapWorker("
"""Prefix of Ray Data's class name for a pool's actors; Ray's state API doesn't know pools."""

LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
NOISY_LOGGERS = (
    # warns that progress bars are off where there is no terminal
    "ray.data._internal.progress",
    # print a traceback if a disk is full; the error is raised as well, and the job reports it
    "ray.data.exceptions",
    "ray.data._internal.execution.streaming_executor_state",
)


@contextmanager
def quiet_driver() -> Iterator[None]:
    """Let `ray.init` make a driver whose C++ code prints what ends the process, and no less.

    Otherwise every job begins with an error of Ray's about the actors of Ray Data's own pools. The
    level is read from the environment when the driver's core worker is made, after Ray's other
    processes were started: these keep theirs. `RAY_BACKEND_LOG_LEVEL` in the environment wins.
    """
    raylet: Any = ray._raylet
    make = raylet.CoreWorker
    if LOG_LEVEL in os.environ:
        yield
        return

    def make_quietly(*args: Any) -> Any:
        os.environ[LOG_LEVEL] = "fatal"
        try:
            with _without_stderr():  # it would say that it found a level in the environment
                return make(*args)
        finally:
            del os.environ[LOG_LEVEL]

    raylet.CoreWorker = make_quietly
    try:
        yield
    finally:
        raylet.CoreWorker = make


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Hold back what the process prints to stderr, unless the block ends with an error."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def map_whole_blocks(dataset: ray.data.Dataset, kind: type, **settings: Any) -> ray.data.Dataset:
    """`Dataset.map_batches` with one block per call.

    The public method refuses `batch_size=None` with GPUs, because blocks might be of any size; ours
    are bounded.
    """
    return dataset.map_batches_internal(kind, batch_size=None, **settings)


def block_refs(dataset: ray.data.Dataset) -> Iterator[list[ray.ObjectRef]]:
    """Yield references to a data set's blocks while it is computed, a few at a time.

    The public `to_arrow_refs` first materialises the whole data set, with all its partial sums.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        refs: Any = bundle.block_refs  # declared as another class than Ray's own `ObjectRef`
        yield list(refs)


def restarting_actors(job: ray.JobID) -> Mapping[str, Mapping[str, Any]]:
    """States of a job's actors that wait for a restart, by ID.

    The public state API needs the dashboard, which not every Ray runs.
    """
    return actors(job_id=job, actor_state_name="RESTARTING")


def kill_actor_for_good(actor: str) -> None:
    """Kill the actor with this ID without a restart.

    The public `ray.kill` needs a handle, and only Ray Data has it.
    """
    core_worker: Any = global_worker.core_worker  # type: ignore[attr-defined]  # set when connected
    core_worker.kill_actor(ray.ActorID.from_hex(actor), True)
