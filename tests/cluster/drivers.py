"""Jobs that go on while tests do things to their cluster."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cluster import Cluster
from tests.faults.killers import LONGEST_RUN
from tests.faults.processes import kill_session, wait_until

PATIENCE = 240  # seconds for a node to join and to be given work


@contextmanager
def running(cluster: Cluster, command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A driver on the cluster's head; the block ends when it has."""
    driver = cluster.start_driver(command, log)
    try:
        yield driver
        driver.wait(LONGEST_RUN)
    finally:
        kill_session(driver.pid)


def wait_for(driver: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Wait for an event of a job that goes on."""
    wait_until(lambda: driver.poll() is not None or condition(), PATIENCE)
    assert driver.poll() is None, "the job ended before it"
