"""Rules between fields that no schema checks: privileges, memory, time to stop, names."""

import re

import pytest
import yaml

from padim_ray.runs import stopping
from tests.infra.manifests import KUBERAY, ROOT, copy, named, quantity

GIB = 2**30


@pytest.fixture(scope="module")
def pods(all_jobs):
    return [(job, pod) for job in all_jobs for pod in job.pods]


@pytest.fixture(scope="module")
def ray_pods(all_jobs):
    return [(job, pod) for job in all_jobs for pod in job.ray_pods]


@pytest.fixture(scope="module")
def containers(all_jobs, pods):
    """Every container with its pod's spec, and the autoscaler's, which KubeRay adds."""
    found = [(pod.container, pod.spec) for _, pod in pods]
    for job in all_jobs:
        found.append((job.cluster["autoscalerOptions"], job.ray_pods[0].spec))
    return found


def mounts(container):
    return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}


# Privileges


def test_every_pod_meets_the_restricted_standard_and_writes_only_to_volumes(containers):
    """The namespace's admission refuses other pods. 1000:100 is the user `ray` of Ray's images."""
    for container, spec in containers:
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (security["runAsUser"], security["runAsGroup"]) == (1000, 100)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_ray_and_the_jobs_write_to_volumes(ray_pods):
    for _, pod in ray_pods:
        where = mounts(pod.container)
        assert {"/tmp", "/tmp/ray", "/dev/shm"} <= set(where)
        for path, name in where.items():
            volume = pod.volumes[name]["emptyDir"]
            assert (volume.get("medium") == "Memory") == (path == "/dev/shm")
        caches = {"MPLCONFIGDIR"} | ({"TRITON_CACHE_DIR"} if pod.group == "gpu" else set())
        for cache in caches:  # by default in the home directory, which is read-only
            assert pod.environment[cache].startswith("/tmp/")


def test_every_volume_exists_and_is_mounted(containers):
    for container, spec in containers:
        assert set(mounts(container).values()) <= {volume["name"] for volume in spec["volumes"]}
        assert "/tmp" in mounts(container)


def test_kuberay_shares_the_heads_logs_with_the_autoscaler(all_jobs):
    """It mounts a volume of this name there, or makes one if none exists."""
    for job in all_jobs:
        assert mounts(job.ray_pods[0].container)["/tmp/ray"] == "ray-logs"
        assert "/tmp/ray" not in mounts(job.cluster["autoscalerOptions"])


def test_only_the_head_has_a_token_for_kubernetes(rendered, pods):
    accounts = named(rendered("nightly"), "ServiceAccount")
    for _, pod in pods:
        account = accounts.get(pod.spec.get("serviceAccountName"), {})
        mounted = pod.spec.get(
            "automountServiceAccountToken", account.get("automountServiceAccountToken", True)
        )
        assert mounted == (pod.group == "headgroup")


# Resources


def test_limits_of_memory_and_disk_equal_the_requests(containers):
    for container, _ in containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert requests.get("ephemeral-storage") == limits.get("ephemeral-storage")
        assert "cpu" in requests and "cpu" not in limits  # idle CPUs of the node may be used


def test_ray_starts_with_the_containers_cpus_and_gpus(ray_pods):
    """Heads run no tasks, and GPU nodes only actors, which ask for no CPU."""
    for _, pod in ray_pods:
        requests, limits = (pod.container["resources"][key] for key in ("requests", "limits"))
        cpus = int(pod.start["num-cpus"])
        assert cpus == (quantity(requests["cpu"]) if pod.group == "cpu" else 0)
        gpus = quantity(limits.get("nvidia.com/gpu", 0))
        assert int(pod.start["num-gpus"]) == gpus == (1 if pod.group == "gpu" else 0)


def test_object_store_and_heap_fit_into_memory(ray_pods):
    for _, pod in ray_pods:
        limit = quantity(pod.container["resources"]["limits"]["memory"])
        store, heap = int(pod.start["object-store-memory"]), int(pod.start["memory"])
        assert store + heap + 2 * GIB <= limit
        shared = quantity(pod.volumes["shared-mem"]["emptyDir"]["sizeLimit"])
        # Ray puts the store on disk if /dev/shm is smaller
        assert store < shared <= store + GIB


def test_volumes_on_disk_fit_into_the_request(pods):
    for _, pod in pods:
        disks = [
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod.volumes.values()
            if volume["emptyDir"].get("medium") != "Memory"
        ]
        assert sum(disks) < quantity(pod.container["resources"]["limits"]["ephemeral-storage"])


def test_ray_keeps_more_idle_workers_than_cpus(ray_pods):
    for _, pod in ray_pods:
        assert int(pod.environment["RAY_num_workers_soft_limit"]) > int(pod.start["num-cpus"])


# Stopping


def test_a_pod_leaves_the_job_time_to_stop(ray_pods):
    for _, pod in ray_pods:
        assert pod.spec["terminationGracePeriodSeconds"] > 25 > stopping.GRACE


def test_the_head_stops_the_job_before_it_ends(all_jobs):
    dockerfile = (ROOT / "infra/docker/Dockerfile").read_text()
    for job in all_jobs:
        head = job.ray_pods[0]
        command = head.container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "/opt/padim-ray/stop_jobs.py", "http://127.0.0.1:8265"]
        assert {"name": "dashboard", "containerPort": 8265} in head.container["ports"]
        assert re.search(r"^COPY infra/docker/stop_jobs.py /opt/padim-ray/$", dockerfile, re.M)
        wait = int(head.environment["RAY_JOB_STOP_WAIT_TIME_S"])
        assert 25 < wait < head.spec["terminationGracePeriodSeconds"]


# Names and labels


def test_selectors_match_the_pods_they_are_for(rendered, pods):
    """A selector with a misspelled label matches nothing, and Kubernetes doesn't complain."""
    documents = rendered("nightly")
    wanted = {
        "padim-ray": {"headgroup", "cpu", "gpu", "submitter"},
        "padim-ray-head": {"headgroup"},
        "padim-ray-metrics": {"headgroup", "cpu", "gpu"},
    }
    selectors = {
        (kind, name): document["spec"].get("podSelector") or document["spec"]["selector"]
        for kind in ("NetworkPolicy", "PodDisruptionBudget")
        for name, document in named(documents, kind).items()
    }
    assert {name for _, name in selectors} == set(wanted)
    for (_, name), selector in selectors.items():
        matched = {
            pod.group
            for job, pod in pods
            if selector["matchLabels"].items() <= pod.labels(job).items()
        }
        assert matched == wanted[name]


def test_names_that_pods_refer_to_exist(rendered, pods):
    documents = rendered("nightly")
    readme = (ROOT / "infra/README.md").read_text()
    for _, pod in pods:
        if "serviceAccountName" in pod.spec:
            assert pod.spec["serviceAccountName"] in named(documents, "ServiceAccount")
        for source in pod.container.get("envFrom", []):
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] in named(documents, "ConfigMap")
            else:
                assert source["secretRef"]["optional"]
                assert f"create secret generic {source['secretRef']['name']} " in readme


def test_the_port_that_prometheus_scrapes_exists(ray_pods):
    for _, pod in ray_pods:
        annotations = pod.template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        # KubeRay starts Ray with this metrics port
        assert int(annotations["prometheus.io/port"]) == ports["metrics"] == 8080


def test_the_site_sets_every_image(pods):
    for _, pod in pods:
        name, _, tag = pod.container["image"].rpartition(":")
        assert name == "registry.example.com/padim-ray"
        assert tag.endswith("-gpu") == (pod.group == "gpu")


def test_everything_is_in_the_namespace_whose_pods_are_restricted(documents):
    namespace = yaml.safe_load((KUBERAY / "namespace.yaml").read_text())["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"]["namespace"] for each in documents} == {namespace["name"]}


def test_every_document_has_the_labels_that_the_readme_applies_by(documents):
    for document in documents:
        labels = document["metadata"]["labels"]
        started = document["kind"] in ("RayJob", "RayCronJob")
        name = document["metadata"]["name"].removeprefix("padim-")
        assert labels["padim-ray/apply"] == (name if started else "setup")
        assert labels["app.kubernetes.io/part-of"] == "padim-ray"


def test_gpu_workers_differ_from_cpu_workers_only_in_what_a_gpu_needs(all_jobs):
    """Two files define them."""
    for job in all_jobs:
        groups = {pod.group: copy(pod.template) for pod in job.ray_pods}
        if "gpu" not in groups:
            continue
        for template in groups.values():
            (container,) = template["spec"]["containers"]
            for key in ("image", "resources"):
                del container[key]
            own = {"RAY_num_workers_soft_limit", "TRITON_CACHE_DIR"}
            container["env"] = [each for each in container["env"] if each["name"] not in own]
            for volume in template["spec"]["volumes"]:
                volume["emptyDir"].pop("sizeLimit")
        tolerations = groups["gpu"]["spec"]["tolerations"]
        tolerations[:] = [each for each in tolerations if each["key"] != "nvidia.com/gpu"]
        assert groups["gpu"] == groups["cpu"]
