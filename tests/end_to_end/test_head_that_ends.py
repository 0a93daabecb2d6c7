"""infra/docker/stop_jobs.py, which a head node runs before it ends, as Kubernetes runs it."""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.cluster import answers, free_port

STOP_JOBS = Path(__file__).parents[2] / "infra/docker/stop_jobs.py"
BIN = Path(sys.executable).parent

# a driver that prints when it is told to end, and what it does then
DRIVER = """
import ray, signal, sys, time
ray.init()
def end(number, frame):
    print("told to end", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""

# submits the driver, runs the script when it is ready, and prints the job's status
STOPPING = """
import json, subprocess, sys, time
from ray.job_submission import JobSubmissionClient
head, stop_jobs, driver = sys.argv[1:]
subprocess.run([sys.executable, stop_jobs, head], check=True)  # nothing runs yet
client = JobSubmissionClient(head)
job = client.submit_job(entrypoint=driver)
while not client.get_job_logs(job).endswith("ready\\n"):  # Ray's log begins with the command
    assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
    time.sleep(0.2)
subprocess.run([sys.executable, stop_jobs, head], check=True)
status, message = client.get_job_status(job), client.get_job_info(job).message
print(json.dumps({"status": status, "message": message, "logs": client.get_job_logs(job)}))
"""


@pytest.fixture
def head(monkeypatch, tmp_path):
    """The dashboard's address of a head without CPUs that requires a token, as in infra/kuberay."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    dashboard = free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--num-cpus=0"),
                *(f"--port={free_port()}", f"--ray-client-server-port={free_port()}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(120):
            if answers("127.0.0.1", dashboard):
                break
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # --block: the head stops its own processes only
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_head_that_ends_stops_the_job_and_waits_for_it(head):
    """The job's status is failed, which KubeRay retries, and not stopped, which it doesn't."""
    ran = subprocess.run(  # a process reads the token only once
        [
            sys.executable,
            "-c",
            STOPPING,
            head,
            STOP_JOBS,
            shlex.join([sys.executable, "-c", DRIVER]),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    job = json.loads(ran.stdout)
    assert job["status"] == "FAILED"
    assert "exit code 143" in job["message"]
    assert job["logs"].endswith("ready\ntold to end\n")
