"""The jobs as users submit them: `ray job submit` to a cluster that wants a token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node of its own, with 2 CPUs and token authentication; yields a submitter's env."""
    dashboard = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = (tmp_path_factory.mktemp("cluster") / "log").open("w")
    head = subprocess.Popen(
        [
            *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2"),
            *(f"--port={free_port()}", f"--ray-client-server-port={free_port()}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert head.poll() is None, Path(log.name).read_text()
            time.sleep(0.5)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        if head.poll() is None:
            os.killpg(head.pid, signal.SIGTERM)  # --block: the head stops its own processes only
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def submit(environment, s3, *entrypoint):
    runtime = {"env_vars": s3.environment}
    return subprocess.run(
        [
            *(BIN / "ray", "job", "submit", "--working-dir", REPOSITORY),
            *("--runtime-env-json", json.dumps(runtime), "--", *map(str, entrypoint)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_submitted_jobs_fit_and_score(cluster, archive, weights, s3):
    s3.upload("submitted", archive)
    s3.upload("outcome")
    images = "s3://submitted/{group}"
    small = ("--image-size", 64, "--n-features", 20, "--weights", weights)
    fitted = submit(
        *(cluster, s3, "python", "jobs/fit.py", "--images", f"{images}/train/good/*"),
        *("--model", "s3://outcome/model", *small),
    )
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    assert "39 images listed, 39 fitted, 0 failed" in fitted.stdout
    scored = submit(
        *(cluster, s3, "python", "jobs/score.py", "--images", f"{images}/test/{{defect}}/*"),
        *("--model", "s3://outcome/model", "--out", "s3://outcome/run"),
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "22 images listed, 22 scored, 0 failed" in scored.stdout
    assert pq.read_table(s3.root / "outcome/run/results").num_rows == 22
    assert s3.secret not in fitted.stdout + fitted.stderr + scored.stdout + scored.stderr


def test_without_the_token_nobody_is_let_in(cluster, s3):
    stranger = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN"}
    refused = submit(stranger | {"HOME": "/nonexistent"}, s3, "python", "jobs/fit.py", "--help")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
