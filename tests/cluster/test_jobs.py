"""The jobs, submitted from outside to a cluster of machines that requires a token."""

import json
import subprocess

import pytest

from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.cluster.conftest import DECODE, MODEL, flags
from tests.cluster.whereabouts import ask_where
from tests.faults.cluster import BIN
from tests.faults.processes import REPOSITORY, wait_until
from tests.faults.report import Differences, compare_models, compare_results, read_results


def submit(cluster, store, *entrypoint, environment=None):
    runtime = json.dumps({"env_vars": store.environment})
    return subprocess.run(
        [
            *(BIN / "ray", "job", "submit", "--address", cluster.dashboard),
            *("--working-dir", REPOSITORY, "--runtime-env-json", runtime),
            *("--", *map(str, entrypoint)),
        ],
        env=environment or cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def submitted(cluster, store, weights):
    """The output of a fit and a score that were submitted to the cluster."""
    model = ("--model", "s3://out/cluster/model", "--decode-resource", DECODE)
    fitted = submit(
        *(cluster, store, "python", "jobs/fit.py", "--images", "s3://archive/{group}/train/*"),
        *("--weights", weights, *model, *flags(MODEL)),
    )
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    scored = submit(
        *(cluster, store, "python", "jobs/score.py", "--images", "s3://archive/{group}/test/*"),
        *("--out", "s3://out/cluster/run", *model),
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    return fitted.stdout + fitted.stderr, scored.stdout + scored.stderr


def test_a_cluster_gives_the_moments_and_scores_of_one_node(submitted, one_node, store):
    model, results = store.root / "out/cluster/model", store.root / "out/cluster/run"
    versions = (open_version(Location.of(str(path))) for path in (one_node.version, model))
    assert compare_models(*versions) == Differences()
    assert compare_results(read_results(one_node.results), read_results(results)) == Differences()
    fitted, scored = submitted
    assert "48 images listed, 48 fitted, 0 failed" in fitted
    assert "24 images listed, 24 scored, 0 failed" in scored
    assert store.secret not in fitted + scored


def test_what_computes_ran_on_gpu_nodes_and_everything_else_on_decoding_nodes(submitted, cluster):
    stages = {"FetchAndDecode", "WriteResults", "DrawHeatmaps", "_describe_task", "_pool_task"}
    stages |= {"_check_task", "_write_task", "_measure_task", "PartialSums", "ScoreImages"}

    def names():
        return " ".join(one.name for one in ask_where(cluster))

    wait_until(lambda: all(stage in names() for stage in stages), 60)
    ran = ask_where(cluster)
    assert {one.is_on_head for one in ran} == {False}
    computes = [one for one in ran if one.is_of_actor or one.name == "_measure_task"]
    assert all("GPU" in one.resources for one in computes)
    assert all(DECODE in one.resources for one in ran if one not in computes)


def test_the_cluster_refuses_clients_without_the_token(cluster, store):
    stranger = cluster.environment | {"HOME": "/nonexistent"}
    del stranger["RAY_AUTH_TOKEN"]
    refused = submit(cluster, store, "python", "jobs/fit.py", "--help", environment=stranger)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
