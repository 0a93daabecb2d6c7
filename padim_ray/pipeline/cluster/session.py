"""A Ray session for a job: connect or start, and Ray Data's settings."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import ray
import ray.data
from ray.data import DataContext
from ray.exceptions import AuthenticationError, RayTaskError

from padim_ray.errors import PadimError
from padim_ray.pipeline.cluster.ray_internals import NOISY_LOGGERS, quiet_driver

log = logging.getLogger("padim_ray")
LOCAL_WORKERS = 2 * (os.cpu_count() or 1) + 8
"""Processes that a Ray started here keeps. Its own limit is the number of CPUs, actors included: it
would end each helper that had nothing to do for a second, and start and import everything anew."""
_is_own_ray = False


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Use the Ray that is running in this process, else connect to a cluster, else start one.

    Raises:
        PadimError: if there is no cluster at the address.
    """
    if ray.is_initialized():
        with _without_tracebacks():
            yield
        return
    on_termination = signal.getsignal(signal.SIGTERM)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_num_workers_soft_limit", str(LOCAL_WORKERS))
    try:
        with quiet_driver():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address == "local" else None,
            )
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PadimError(f"Ray can't be reached at {address!r}: {reason}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put a handler of its own there
    global _is_own_ray
    _is_own_ray = address == "local"
    try:
        with _without_tracebacks():
            yield
    finally:
        _is_own_ray = False
        ray.shutdown()


def is_own_ray() -> bool:
    """Whether Ray was started by this process, for itself: then no node ever joins."""
    return _is_own_ray


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Turn a user's mistake that a worker met back into itself: one sentence."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, PadimError):
            # Ray Data appends lines about its own retries
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from None
        raise


@contextmanager
def rows_of(dataset: ray.data.Dataset) -> Iterator[Iterator[dict[str, Any]]]:
    """A data set's rows, computed while they are read: no longer than the block lasts.

    Without the end of its iterator, a data set that is left early goes on in the background.
    """
    iterator: Any = iter(dataset.iter_rows())  # a generator, which `Iterator` doesn't say
    with closing(iterator) as rows:
        yield rows


@contextmanager
def data_context(*, preserve_order: bool) -> Iterator[DataContext]:
    """Ray Data's settings for one of our data sets; the caller's own come back afterwards.

    Args:
        preserve_order: blocks leave every stage in the order of the manifest.
    """
    original = DataContext.get_current()
    context = original.copy()
    context.execution_options.preserve_order = preserve_order
    context.enable_progress_bars = context.enable_progress_bars and sys.stdout.isatty()
    context.enable_rich_progress_bars, context.use_ray_tqdm = True, False
    context.print_on_execution_start = False
    # it would recommend a setting of ours to users: tasks' memory is bounded by their shard
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    context.raise_original_map_exception = True  # for `_without_tracebacks`
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # we log a line per stage ourselves
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with DataContext.current(context):
        yield context
