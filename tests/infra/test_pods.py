"""What schemas can't say of the pods: they are unprivileged, fit their nodes, end in time."""

import json
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
    """Every container with its pod's spec; the autoscaler's, too, which KubeRay adds."""
    found = [(pod.container, pod.spec) for _, pod in pods]
    for job in all_jobs:
        found.append((job.cluster["autoscalerOptions"], job.ray_pods[0].spec))
    return found


def mounts(container):
    return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}


# Privileges


def test_pods_are_not_roots_and_have_the_default_seccomp_profile(pods):
    for _, pod in pods:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
        # `ray` in Ray's images; a name wouldn't do
        assert (security["runAsUser"], security["runAsGroup"]) == (1000, 100)


def test_containers_gain_no_privileges_and_write_only_to_volumes(containers):
    for container, _ in containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_ray_and_a_job_write_to_is_a_volume(ray_pods):
    for _, pod in ray_pods:
        where = mounts(pod.container)
        assert {"/tmp", "/tmp/ray", "/dev/shm"} <= set(where)
        for path, name in where.items():
            volume = pod.volumes[name]["emptyDir"]
            assert (volume.get("medium") == "Memory") == (path == "/dev/shm")
        caches = {"MPLCONFIGDIR"} | ({"TRITON_CACHE_DIR"} if pod.group == "gpu" else set())
        for cache in caches:  # else in the home directory, which is read-only
            assert pod.environment[cache].startswith("/tmp/")


def test_every_volume_exists_and_is_mounted(containers):
    for container, spec in containers:
        assert set(mounts(container).values()) <= {volume["name"] for volume in spec["volumes"]}
        assert "/tmp" in mounts(container)


def test_kuberay_shares_the_heads_logs_with_the_autoscaler(all_jobs):
    """It mounts a volume of this name there, or makes one if there is none."""
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


def test_memory_and_disk_are_what_was_asked_for(containers):
    for container, _ in containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert requests.get("ephemeral-storage") == limits.get("ephemeral-storage")
        assert "cpu" in requests and "cpu" not in limits  # idle CPUs may be used


def test_ray_is_told_of_the_cpus_and_gpus_that_a_container_has(ray_pods):
    for _, pod in ray_pods:
        requests, limits = (pod.container["resources"][key] for key in ("requests", "limits"))
        cpus = int(pod.start["num-cpus"])
        assert cpus == (0 if pod.group == "headgroup" else quantity(requests["cpu"]))
        gpus = quantity(limits.get("nvidia.com/gpu", 0))
        assert int(pod.start["num-gpus"]) == gpus == (1 if pod.group == "gpu" else 0)


def test_object_store_and_heap_fit_into_memory(ray_pods):
    for _, pod in ray_pods:
        limit = quantity(pod.container["resources"]["limits"]["memory"])
        store, heap = int(pod.start["object-store-memory"]), int(pod.start["memory"])
        assert store + heap + 2 * GIB <= limit
        shared = quantity(pod.volumes["shared-mem"]["emptyDir"]["sizeLimit"])
        # Ray takes the disk instead where /dev/shm is smaller than the store
        assert store < shared <= store + GIB


def test_volumes_on_disk_fit_into_what_was_asked_for(pods):
    for _, pod in pods:
        disks = [
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod.volumes.values()
            if volume["emptyDir"].get("medium") != "Memory"
        ]
        assert sum(disks) < quantity(pod.container["resources"]["limits"]["ephemeral-storage"])


def test_ray_keeps_more_helper_processes_than_cpus(ray_pods):
    for _, pod in ray_pods:
        assert int(pod.environment["RAY_num_workers_soft_limit"]) > int(pod.start["num-cpus"])


# Ending


def test_a_pod_leaves_the_job_time_to_end(ray_pods):
    for _, pod in ray_pods:
        assert pod.spec["terminationGracePeriodSeconds"] > 25 > stopping.GRACE


def test_the_head_tells_the_job_to_end_first(all_jobs):
    dockerfile = (ROOT / "infra/docker/Dockerfile").read_text()
    for job in all_jobs:
        head = job.ray_pods[0]
        command = head.container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "/opt/padim-ray/stop_jobs.py", "http://127.0.0.1:8265"]
        assert {"name": "dashboard", "containerPort": 8265} in head.container["ports"]
        assert re.search(r"^COPY infra/docker/stop_jobs.py /opt/padim-ray/$", dockerfile, re.M)
        wait = int(head.environment["RAY_JOB_STOP_WAIT_TIME_S"])
        assert 25 < wait < head.spec["terminationGracePeriodSeconds"]


# Placement


def test_workers_may_be_spot_nodes_and_heads_may_not(ray_pods):
    spot = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "spot"}
    for _, pod in ray_pods:
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", [])}
        if pod.group == "headgroup":
            assert not tolerated
            rules = pod.spec["affinity"]["nodeAffinity"]
            (term,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
            refused = {
                rule["key"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"
            }
            assert {"eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot"} <= refused
        else:
            assert spot <= tolerated
            assert ("nvidia.com/gpu" in tolerated) == (pod.group == "gpu")


def test_the_budget_protects_every_head_and_nothing_else(rendered, ray_pods):
    budget = named(rendered("nightly"), "PodDisruptionBudget")["padim-ray-head"]["spec"]
    # of pods whose controller has no scale, Kubernetes takes only a whole number of these
    assert isinstance(budget["minAvailable"], int) and budget["minAvailable"] >= 1000
    assert "maxUnavailable" not in budget
    for job, pod in ray_pods:
        selected = budget["selector"]["matchLabels"].items() <= pod.labels(job).items()
        assert selected == (pod.group == "headgroup")


# Names


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


def test_prometheus_is_told_of_a_port_that_exists(ray_pods):
    for _, pod in ray_pods:
        annotations = pod.template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        # KubeRay starts Ray with its metrics there
        assert int(annotations["prometheus.io/port"]) == ports["metrics"] == 8080


def test_a_site_changes_every_image_at_once(pods):
    for _, pod in pods:
        name, _, tag = pod.container["image"].rpartition(":")
        assert name == "registry.example.com/padim-ray"
        assert tag.endswith("-gpu") == (pod.group == "gpu")


def test_nothing_secret_is_written_in_a_manifest(documents):
    assert not named(documents, "Secret")
    text = json.dumps(documents)
    assert "AWS_SECRET_ACCESS_KEY" not in text and "RAY_AUTH_TOKEN" not in text


def test_everything_is_in_the_namespace_whose_pods_are_restricted(documents):
    namespace = yaml.safe_load((KUBERAY / "namespace.yaml").read_text())["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"]["namespace"] for each in documents} == {namespace["name"]}


def test_every_document_says_with_what_it_is_applied(documents):
    for document in documents:
        labels = document["metadata"]["labels"]
        started = document["kind"] in ("RayJob", "RayCronJob")
        name = document["metadata"]["name"].removeprefix("padim-")
        assert labels["padim-ray/apply"] == (name if started else "setup")
        assert labels["app.kubernetes.io/part-of"] == "padim-ray"


def test_gpu_workers_differ_from_cpu_workers_only_where_they_must(all_jobs):
    """The two are written down apart."""
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
