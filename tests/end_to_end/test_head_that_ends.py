"""What a head node does before it ends: infra/docker/stop_jobs.py, run as Kubernetes would."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

STOP_JOBS = Path(__file__).parents[2] / "infra/docker/stop_jobs.py"
BIN = Path(sys.executable).parent

# a driver that says when it was told to end, and what it then did
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(monkeypatch, tmp_path):
    """A head without CPUs that wants a token, as in infra/kuberay: its dashboard's address."""
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
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # --block: the head stops its own processes only
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def run(command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def test_a_head_that_ends_tells_the_job_and_waits_for_it(head):
    """The job counts as failed, which KubeRay tries again, and not as stopped, which it doesn't."""
    assert run([sys.executable, STOP_JOBS, head]).returncode == 0  # nothing runs yet
    submit = ["ray", "job", "submit", "--address", head, "--no-wait", "--submission-id", "job"]
    submitted = run([BIN / submit[0], *submit[1:], "--", sys.executable, "-c", DRIVER])
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    client = JobSubmissionClient(head)
    while "ready" not in client.get_job_logs("job"):
        assert not client.get_job_status("job").is_terminal(), client.get_job_logs("job")
        time.sleep(0.2)
    stopped = run([sys.executable, STOP_JOBS, head])
    assert stopped.returncode == 0, stopped.stderr
    assert client.get_job_status("job") == JobStatus.FAILED
    assert "exit code 143" in client.get_job_info("job").message
    assert client.get_job_logs("job").count("told to end") == 1
