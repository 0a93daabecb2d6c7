"""Jobs that run while tests disturb their cluster."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cluster import Cluster
from tests.faults.killers import MAX_RUN_SECONDS
from tests.faults.processes import kill_session, wait_until

PATIENCE = 240  # seconds for a node to join and to get work


@contextmanager
def running(cluster: Cluster, command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a driver on the cluster's head; leaving the block waits for its end."""
    driver = cluster.start_driver(command, log)
    try:
        yield driver
        driver.wait(MAX_RUN_SECONDS)
    finally:
        kill_session(driver.pid)


def wait_for(driver: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Wait for a condition, or for the end of the job."""
    wait_until(lambda: driver.poll() is not None or condition(), PATIENCE)
    assert driver.poll() is None, "the job ended before it"
