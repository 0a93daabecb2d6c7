"""Being told to stop, as Kubernetes does it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from padim_ray.storage.heartbeat import describe_process
from padim_ray.storage.location import Location

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import signal, sys, time
from padim_ray.runs import stopping
stopping.GRACE = 1.0
stop = stopping.StopSignal()
signal.signal(signal.SIGTERM, stop)
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(float(sys.argv[1]))
    print("tidied up", flush=True)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(("takes", "told"), [(0.1, "tidied up\n"), (60, "")])
def test_a_process_ends_in_time_however_long_tidying_up_would_take(takes, told):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(takes)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        process.terminate()  # told twice
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert process.stdout.read() == told


COMMANDS = [
    (sys.executable, REPOSITORY / "jobs/fit.py"),
    (sys.executable, "-c", "from padim_ray.cli import main; main()", "fit"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_that_is_told_to_stop_says_how_to_continue(command, archive, weights, tmp_path):
    # it waits for signs of life of another machine's job, and so can be told at a known point
    place = Location.of(str(tmp_path / "model"))
    claim = describe_process("fit") | {"boot": "elsewhere", "host": "node7"}
    (place / ".claims/000001.json").write(json.dumps(claim).encode())
    with subprocess.Popen(
        [
            *command,
            *("--images", f"{archive}/{{group}}/train/good/*", "--model", place.uri),
            *("--weights", weights),
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while "for a heartbeat" not in process.stderr.readline():
            assert process.poll() is None
        started = time.monotonic()
        process.terminate()
        rest = process.stderr.read()
        assert process.wait() == 143
    assert time.monotonic() - started < 25
    assert "Stopped by SIGTERM: what is done is kept. Repeat the command to continue" in rest
