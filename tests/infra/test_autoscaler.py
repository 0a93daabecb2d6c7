"""Ray's autoscaler and `ray start` understand the worker groups."""

import json
import shlex

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, NodeState, NodeStatus
from ray.core.generated.instance_manager_pb2 import Instance
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler import _to_resource_bundle

from padim_ray.planning.resources import Node, plan_resources
from tests.infra.manifests import quantity


def autoscaling_config(job):
    """The configuration that Ray's autoscaler derives from a job's cluster."""
    cluster = {"metadata": {"name": job.name, "namespace": "padim-ray"}, "spec": job.cluster}
    return _derive_autoscaling_config_from_ray_cr(cluster)


@pytest.fixture(scope="module")
def node_types(all_jobs):
    """The node types that Ray's autoscaler derives from each job's cluster."""
    return [autoscaling_config(job)["available_node_types"] for job in all_jobs]


def test_the_head_runs_no_tasks(node_types):
    for types in node_types:
        resources = types["headgroup"]["resources"]
        assert (resources["CPU"], resources["GPU"]) == (0, 0)
        assert "padim_decode" not in resources


def test_images_are_decoded_on_cpu_nodes_only(node_types):
    for types in node_types:
        decoding = {name for name, each in types.items() if "padim_decode" in each["resources"]}
        assert decoding == {"cpu"}
        # a decoding task asks for 0.001: CPUs, not this resource, limit their number
        assert types["cpu"]["resources"]["padim_decode"] / 0.001 > types["cpu"]["resources"]["CPU"]


def test_actors_find_gpus_on_gpu_nodes_only(node_types):
    assert any("gpu" in types for types in node_types)
    for types in node_types:
        with_gpus = {name for name, each in types.items() if each["resources"].get("GPU")}
        assert with_gpus == {"gpu"} & set(types)


def test_each_group_can_grow_and_shrink(node_types):
    for types in node_types:
        for name, each in types.items():
            if name != "headgroup":
                assert each["min_workers"] < each["max_workers"]
                assert each["idle_timeout_s"] > 0


def test_the_autoscaler_plans_with_less_memory_than_the_limit(node_types, all_jobs):
    for types, job in zip(node_types, all_jobs, strict=True):
        for pod in job.ray_pods:
            limit = quantity(pod.container["resources"]["limits"]["memory"])
            assert types[pod.group]["resources"]["memory"] < limit


def test_custom_resources_survive_the_shell_that_starts_ray(all_jobs):
    """KubeRay puts `ray start --name=value …` into a command for bash."""
    for job in all_jobs:
        for pod in job.ray_pods:
            if "resources" in pod.start:
                (word,) = shlex.split(f"--resources={pod.start['resources']}")
                assert json.loads(word.removeprefix("--resources=")) == {"padim_decode": 1000}


def launch(config, running, bundles):
    """The nodes that Ray's second autoscaler starts for a request by Ray Data.

    Args:
        config: of the autoscaler.
        running: number of running nodes of each type.
        bundles: resources that the whole cluster is to have room for.
    """
    instances = []
    for node_type, count in running.items():
        resources = config["available_node_types"][node_type]["resources"]
        for name in (f"{node_type}-{number}" for number in range(count)):
            node = NodeState(
                node_id=name.encode(),
                ray_node_type_name=node_type,
                total_resources=resources,
                status=NodeStatus.RUNNING,
            )
            instance = Instance(
                instance_id=name, instance_type=node_type, status=Instance.RAY_RUNNING
            )
            instances.append(AutoscalerInstance(name, node, instance))
    parsed = AutoscalingConfig(config, skip_content_hash=True)
    requests = ResourceRequestUtil.group_by_count(map(ResourceRequestUtil.make, bundles))
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=parsed.get_node_type_configs(),
            max_num_nodes=parsed.get_max_num_nodes(),
            cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=requests)],
            current_instances=instances,
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def requested(share, *, cpus=None):
    """Bundles that Ray Data requests for tasks of this share, for one or for this many CPUs."""
    asked = {"CPU": share.cpus, "GPU": share.gpus, **share.options["resources"]}
    bundle = _to_resource_bundle(ExecutionResources.from_resource_dict(asked))
    return [bundle] * (1 if cpus is None else int(cpus / share.cpus))


@pytest.fixture(scope="module")
def with_gpus(all_jobs):
    """Autoscaler's configuration, plan and head of the nightly job, whose cluster has GPUs."""
    (job,) = [job for job in all_jobs if job.name.startswith("padim-nightly")]
    config = autoscaling_config(job)
    (cpus,) = [pod.start["num-cpus"] for pod in job.ray_pods if pod.group == "cpu"]
    gpus = config["available_node_types"]["gpu"]["max_workers"]
    nodes = [Node(float(cpus))]
    plan = plan_resources(nodes, gpus=gpus, decode_resource="padim_decode", grows=True)
    return config, plan, job.ray_pods[0]


def test_busy_decoding_starts_cpu_nodes_only(with_gpus):
    """Ray Data leaves custom resources out of its requests (ray-project/ray#49589)."""
    config, plan, _ = with_gpus
    most = config["available_node_types"]["cpu"]["max_workers"]
    assert "padim_decode" not in requested(plan.decode)[0]
    for nodes in range(1, most):
        cpus = nodes * 14 + 1
        started = launch(config, {"headgroup": 1, "cpu": nodes}, requested(plan.decode, cpus=cpus))
        assert started == {"cpu": 1}
    too_many = requested(plan.decode, cpus=most * 14 + 1)
    assert launch(config, {"headgroup": 1, "cpu": most}, too_many) == {}


def test_actors_start_gpu_nodes(with_gpus):
    config, plan, _ = with_gpus
    bundles = requested(plan.actor) * 3
    assert launch(config, {"headgroup": 1, "cpu": 1, "gpu": 1}, bundles) == {"gpu": 2}


def test_requests_grow_in_steps_that_the_cpu_group_has_room_for(with_gpus):
    """The autoscaler starts no node at all for a request that exceeds the group's maximum."""
    config, plan, head = with_gpus
    most = config["available_node_types"]["cpu"]["max_workers"]
    step = float(head.environment["RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_MAX_CPU_RESOURCE_DELTA"])
    nodes = 1
    while True:
        asked = requested(plan.decode, cpus=min(2 * nodes * 14, nodes * 14 + step))
        started = launch(config, {"headgroup": 1, "cpu": nodes}, asked)
        if not started:
            break
        nodes += started["cpu"]
    assert nodes > 0.8 * most
