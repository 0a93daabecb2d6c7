"""Ray's autoscaler and `ray start` understand the worker groups."""

import json
import shlex

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from tests.infra.manifests import quantity


@pytest.fixture(scope="module")
def node_types(all_jobs):
    """The node types that Ray's autoscaler derives from each job's cluster."""
    configs = []
    for job in all_jobs:
        cluster = {"metadata": {"name": job.name, "namespace": "padim-ray"}, "spec": job.cluster}
        configs.append(_derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"])
    return configs


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
