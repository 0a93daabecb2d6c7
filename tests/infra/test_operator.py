"""What KubeRay 1.7 refuses or gets wrong, beyond its schemas (ray-operator's validation.go)."""

import re

import pytest
import yaml

from tests.infra.crds import definition
from tests.infra.manifests import KUBERAY, named


def test_names_leave_room_for_what_kuberay_appends(documents):
    for kind, longest in {"RayJob": 47, "RayCronJob": 36}.items():
        for name in named(documents, kind):
            assert len(name) <= longest and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_a_finished_jobs_cluster_is_deleted_whatever_its_end(all_jobs):
    for job in all_jobs:
        assert job.spec["shutdownAfterJobFinishes"] is True
        assert job.spec["ttlSecondsAfterFinished"] > 0
        assert "deletionStrategy" not in job.spec  # excludes the above


def test_no_job_runs_or_waits_forever(all_jobs):
    for job in all_jobs:
        assert 0 < job.spec["preRunningDeadlineSeconds"] < job.spec["activeDeadlineSeconds"]


def test_a_failed_job_is_tried_again(all_jobs):
    for job in all_jobs:
        assert job.spec["backoffLimit"] >= 1


def test_a_pod_of_its_own_submits_the_job(all_jobs):
    for job in all_jobs:
        assert job.spec["submissionMode"] == "K8sJobMode"  # the others take no template for a pod
        assert job.spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
        # else KubeRay wouldn't say what to submit
        assert "command" not in job.spec["submitterPodTemplate"]["spec"]["containers"][0]


def test_a_token_is_required_and_made_by_kuberay(all_jobs):
    for job in all_jobs:
        assert job.cluster["authOptions"] == {"mode": "token"}
        assert tuple(map(int, job.cluster["rayVersion"].split("."))) >= (2, 52, 0)


def test_the_second_autoscaler_is_on(all_jobs):
    for job in all_jobs:
        assert job.cluster["enableInTreeAutoscaling"] is True
        assert job.cluster["autoscalerOptions"]["version"] == "v2"
        for pod in job.ray_pods:
            assert "restartPolicy" not in pod.spec  # it must be Never, and is then
            assert "RAY_enable_autoscaler_v2" not in pod.environment


def test_groups_have_one_source_of_resources(all_jobs):
    for job in all_jobs:
        for group in (job.cluster["headGroupSpec"], *job.cluster["workerGroupSpecs"]):
            assert not group.get("resources") and "labels" not in group["rayStartParams"]


def test_a_job_begins_with_one_cpu_node_and_may_grow(all_jobs):
    """KubeRay submits the job when `replicas` of each group are ready."""
    for job in all_jobs:
        for group in job.cluster["workerGroupSpecs"]:
            first = {"cpu": 1, "gpu": 0}[group["groupName"]]
            assert first == group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def test_the_cluster_of_a_job_needs_nothing_that_is_off_by_default(all_jobs):
    for job in all_jobs:
        assert not {"networkPolicy", "tlsOptions", "historyServerOptions"} & set(job.cluster)


def test_budgets_for_rayclusters_need_whole_numbers():
    """Kubernetes takes nothing else where the pods' controller has no scale."""
    assert set(definition("RayCluster")["subresources"]) == {"status"}


@pytest.fixture
def values():
    return yaml.safe_load((KUBERAY / "operator-values.yaml").read_text())


def test_the_operator_is_installed_with_cron_jobs(values):
    assert {"name": "RayCronJob", "enabled": True} in values["featureGates"]


def test_the_operator_waits_for_a_head_that_moves_to_another_node(values):
    environment = {entry["name"]: entry["value"] for entry in values["env"]}
    assert int(environment["RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"]) >= 900
