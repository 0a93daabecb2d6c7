"""The benchmarks run; their figures are not checked."""

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from benchmarks.shares import shares


def test_the_gpu_benchmark_runs_on_a_cpu_without_ray(tmp_path):
    out = tmp_path / "gpu.json"
    without_ray = "import sys; sys.modules['ray'] = None; from benchmarks.gpu import main; main()"
    arguments = "--device cpu --batches 32 64 --cases resnet18/100 resnet18/all --image-size 32"
    subprocess.run(
        [
            sys.executable,
            "-c",
            without_ray,
            *arguments.split(),
            "--seconds",
            "0.01",
            "--repeats",
            "1",
            "--out",
            str(out),
        ],
        check=True,
    )
    rows = json.loads(out.read_text())
    assert [(row["channels"], row["batch"]) for row in rows] == [
        ("100", 32),
        ("100", 64),
        ("all", 32),
        ("all", 64),
    ]
    assert all(row["fit"] > 0 and row["score"] > 0 and row["trunk"] > 0 for row in rows)


def test_shares_of_the_cores_and_idle_time_add_up():
    found = Counter()
    child = [sys.executable, "-c", "while True: pass", "ray::MapWorker(MapBatches(ScoreImages))"]
    with shares(found), subprocess.Popen(child) as busy:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            time.sleep(0.01)
        busy.kill()
    assert found["actor"] > 0
    assert sum(found.values()) == pytest.approx(1)
