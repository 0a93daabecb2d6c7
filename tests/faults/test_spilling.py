"""Jobs whose machine has no room on disk for the objects that Ray spills."""

import os
import re
import subprocess
import sys

import pytest

from tests.faults.cluster import Cluster
from tests.faults.processes import REPOSITORY

pytestmark = pytest.mark.slow_faults

LARGE = (
    *("--image-size", "192", "--n-features", "200", "--precision", "float32"),
    *("--stride", "4", "--neighbourhood", "1"),
)
SMALL_STORE = 80_000_000  # bytes; one group's statistics are larger


@pytest.fixture
def fit(archive, weights, tmp_path):
    """A function that fits a model with Ray as the arguments say, and returns the process."""

    def run(*arguments, **environment):
        images, model = f"{archive}/{{group}}/train/good/*", str(tmp_path / "model")
        return subprocess.run(
            [
                *(sys.executable, "jobs/fit.py", "--images", images, "--model", model),
                *("--weights", weights, "--calibration-images", "0", *LARGE, *arguments),
            ],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | environment,
        )

    return run


def test_a_job_says_before_and_after_that_the_spill_disk_is_too_small_and_continues(fit, disk):
    directory, give_space = disk
    own_ray = {
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(SMALL_STORE),
        "RAY_object_spilling_directory": str(directory),
    }
    stopped = fit(**own_ray)
    assert stopped.returncode == 2, stopped.stderr
    holds = f"object store holds 80 MB, and the disk of {directory} has room for 996 kB more"
    assert f"{holds}. Make room, or set RAY_object_spilling_directory" in stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"Error: The disk of {directory} is full, so Ray can't spill objects")
    assert "for an object store of 80 MB" in last and "Traceback" not in stopped.stderr
    assert give_space("4g")
    finished = fit(**own_ray)
    assert finished.returncode == 0, finished.stderr
    assert "Make room" not in finished.stderr


def test_a_job_on_a_cluster_names_the_node_whose_spill_disk_is_full(fit, disk):
    spill = {"RAY_object_spilling_directory": str(disk[0])}
    with Cluster(workers=1, object_store_bytes=SMALL_STORE, environment=spill) as cluster:
        stopped = fit("--address", cluster.address, **cluster.environment)
    assert stopped.returncode == 2, stopped.stderr
    assert "nodes' object stores hold 160 MB: the rest is spilled to the nodes' disks" in (
        stopped.stderr
    )
    last = stopped.stderr.splitlines()[-1]
    # Ray names the machine's own address, whatever address the node was started with
    assert re.match(r"Error: The disk of node [0-9.]+ is full, so Ray can't spill objects", last)
    assert "--object-spilling-directory" in last and "Traceback" not in stopped.stderr
