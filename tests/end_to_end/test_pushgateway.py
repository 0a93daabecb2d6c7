"""Prometheus finds the outcomes of runs in the morning, when their Ray is gone."""

import json
from datetime import datetime

import pytest

import padim_ray
from padim_ray.runs.pushgateway import VARIABLE
from tests.helpers.pushgateway import outcomes, serve_pushgateway


def test_runs_leave_their_outcome_and_a_repeated_one_the_same(
    ray_cluster, archive, weights, tmp_path, monkeypatch
):
    model = str(tmp_path / "model")
    scoring = {"images": f"{archive}/{{group}}/test/*/*", "model": model, "heatmaps": "none"}
    with serve_pushgateway() as gateway:
        padim_ray.fit(
            **{"images": f"{archive}/{{group}}/train/good/*", "model": model, "weights": weights},
            **{"image_size": 64, "n_features": 20},
        )
        assert outcomes(gateway) == {}  # no gateway is set
        monkeypatch.setenv(VARIABLE, gateway)
        padim_ray.score(out=str(tmp_path / "run"), **scoring)
        run = json.loads((tmp_path / "run/run.json").read_text())
        expected = {
            "timestamp_seconds": datetime.fromisoformat(run["finished_at"]).timestamp(),
            "images": 22,
            "failed_images": 0,
            "flagged_images": run["flagged"],
            "duration_seconds": pytest.approx(run["seconds"], abs=0.1),
        }
        found = outcomes(gateway)["score", model]
        assert found.pop("timestamp_seconds") == pytest.approx(expected["timestamp_seconds"], abs=1)
        monkeypatch.delenv(VARIABLE)
    with serve_pushgateway() as empty:  # the attempt was killed before it pushed
        monkeypatch.setenv(VARIABLE, empty)
        padim_ray.score(out=str(tmp_path / "run"), **scoring)
        assert outcomes(empty)["score", model] == expected
