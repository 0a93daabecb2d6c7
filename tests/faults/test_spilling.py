"""A job on one machine whose disk has no room for the objects that Ray spills."""

import os
import subprocess
import sys

import pytest

from tests.faults.processes import REPOSITORY

LARGE = ("--image-size", "192", "--n-features", "200", "--precision", "float32")
SMALL_STORE = "80000000"  # bytes; one group's statistics are larger


@pytest.fixture
def fit(disk, archive, weights, tmp_path):
    """A function that fits a model beside a small object store, and returns the process."""

    def run():
        images, model = f"{archive}/{{group}}/train/good/*", str(tmp_path / "model")
        return subprocess.run(
            [
                *(sys.executable, "jobs/fit.py", "--images", images, "--model", model),
                *("--weights", weights, "--calibration-images", "0", *LARGE),
            ],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": SMALL_STORE,
                "RAY_object_spilling_directory": str(disk[0]),
            },
        )

    return run


@pytest.mark.slow_faults
def test_a_job_says_before_and_after_that_the_spill_disk_is_too_small_and_continues(fit, disk):
    directory, give_space = disk
    stopped = fit()
    assert stopped.returncode == 2, stopped.stderr
    holds = f"object store holds 80 MB, and the disk of {directory} has room for 996 kB more"
    assert f"{holds}. Make room, or set RAY_object_spilling_directory" in stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"Error: The disk of {directory} is full, so Ray can't spill objects")
    assert "for an object store of 80 MB" in last and "Traceback" not in stopped.stderr
    assert give_space("4g")
    finished = fit()
    assert finished.returncode == 0, finished.stderr
    assert "Make room" not in finished.stderr
