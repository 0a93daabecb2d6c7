"""Everything of Ray's that isn't public API, in one place.

pyproject.toml pins Ray to the minor versions that this was tested with, and
`tests/pipeline/test_ray_internals.py` names what a new one broke.
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
from ray.types import ObjectRef

POOL_ACTOR = "MapWorker("
"""How Ray Data's name for the class of a pool's actors begins: the state API doesn't tell pools."""

LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
NOISY_LOGGERS = (
    # progress bars are switched off where there is no terminal, and a warning would say so
    "ray.data._internal.progress",
    # they print the traceback of a full disk; what fails is raised, and reported by us
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
    make = ray._raylet.CoreWorker
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

    ray._raylet.CoreWorker = make_quietly
    try:
        yield
    finally:
        ray._raylet.CoreWorker = make


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
    """`Dataset.map_batches` with a block per call.

    The public method refuses `batch_size=None` with GPUs, since a block might be of any size; ours
    are bounded.
    """
    return dataset.map_batches_internal(kind, batch_size=None, **settings)


def block_refs(dataset: ray.data.Dataset) -> Iterator[list[ObjectRef]]:
    """References to a data set's blocks while it is computed, a few at a time.

    The public `to_arrow_refs` materialises the data set first: all partial sums at once.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        yield list(bundle.block_refs)


def restarting_actors(job: ray.JobID) -> Mapping[str, Mapping[str, Any]]:
    """A job's actors that Ray wants to restart, by ID.

    The public state API asks the dashboard, which a Ray without one lacks.
    """
    return actors(job_id=job, actor_state_name="RESTARTING")


def kill_actor_for_good(actor: str) -> None:
    """End an actor of that ID without a restart: `ray.kill` wants a handle, which is Ray Data's."""
    core_worker: Any = global_worker.core_worker  # type: ignore[attr-defined]
    core_worker.kill_actor(ray.ActorID.from_hex(actor), True)
