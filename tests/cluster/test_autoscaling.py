"""A cluster that starts with only a head: Ray's autoscaler adds the nodes that a job asks for."""

import json

import pytest
from ray.autoscaler._private.fake_multi_node import node_provider
from ray.autoscaler._private.kuberay import autoscaling_config

from padim_ray.pipeline.cluster.device import FAKE_GPUS
from tests.cluster.conftest import DECODE
from tests.cluster.drivers import running, wait_for
from tests.cluster.whereabouts import ask_nodes, ask_where
from tests.faults.cluster import OBJECT_STORE_BYTES, Cluster
from tests.faults.report import Differences, compare_results, read_results

pytestmark = pytest.mark.cluster

HEAD = node_provider.FAKE_HEAD_NODE_TYPE
FAKE_CLUSTER = {
    FAKE_GPUS: "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": node_provider.FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_provider.FAKE_HEAD_NODE_ID,
}


def describe_cluster(address):
    """The autoscaler's configuration: decoding nodes and GPU nodes without CPUs, none at first."""

    def nodes(most, **resources):
        resources["object_store_memory"] = OBJECT_STORE_BYTES
        return {"resources": resources, "node_config": {}, "max_workers": most}

    return {
        **autoscaling_config._generate_legacy_autoscaling_config_fields(),
        "cluster_name": "fake",
        "max_workers": 4,
        "provider": {
            "type": "external",  # the wheel lacks files that "fake_multinode" needs
            "module": f"{node_provider.__name__}.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: nodes(0, CPU=0),
            "decode": nodes(1, CPU=2, **{DECODE: 1000}),
            "gpu": nodes(3, CPU=0, GPU=1),
        },
    }


@pytest.fixture
def scaling_cluster(add_machine, tmp_path):
    def options(address):
        file = tmp_path / "cluster.json"
        file.write_text(json.dumps(describe_cluster(address)))
        return [f"--autoscaling-config={file}"]

    with Cluster(
        workers=0,
        head=add_machine(),
        dashboard=True,
        head_options=options,
        environment=FAKE_CLUSTER,
    ) as cluster:
        yield cluster


def test_a_job_gets_the_nodes_that_it_asks_for(scaling_cluster, job, proxy, store, many, tmp_path):
    command = job(scaling_cluster, "score", "s3://out/scaled", "--gpus", 2)
    log = tmp_path / "log"

    def made():
        return [one for one in ask_where(scaling_cluster) if one.name.endswith("get_location")]

    with (
        proxy.holding("/gaussian-") as actors_at_work,
        running(scaling_cluster, command, log) as driver,
    ):
        wait_for(driver, lambda: [one.state for one in made()] == ["FINISHED"] * 2)
        actors_at_work.release()
    assert driver.returncode == 0, log.read_text()
    assert "no CPUs with the resource 'padim_decode' yet" in log.read_text()
    assert "0 of 2 GPUs are available" in log.read_text()
    found = compare_results(read_results(many), read_results(store.root / "out/scaled"))
    assert found == Differences()
    assert sum("GPU" in node for node in ask_nodes(scaling_cluster)) == 2  # of at most 3
    ran = ask_where(scaling_cluster)
    assert not any(one.is_on_head for one in ran)
    assert all("GPU" in one.resources for one in ran if one.is_of_actor)
    assert all(DECODE in one.resources for one in ran if not one.is_of_actor)
