"""Rules of KubeRay 1.7 that its schemas don't express (ray-operator's validation.go)."""

import re

from tests.infra.crds import definition
from tests.infra.manifests import named


def test_names_leave_room_for_the_suffixes_that_kuberay_appends(documents):
    for kind, max_length in {"RayJob": 47, "RayCronJob": 36}.items():
        for name in named(documents, kind):
            assert len(name) <= max_length and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_a_separate_pod_submits_the_job(all_jobs):
    for job in all_jobs:
        assert job.spec["submissionMode"] == "K8sJobMode"  # other modes ignore the pod template
        assert job.spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
        # with a command of ours, KubeRay would not set its own
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
            assert "restartPolicy" not in pod.spec  # KubeRay sets Never and accepts nothing else
            assert "RAY_enable_autoscaler_v2" not in pod.environment


def test_resources_of_a_group_come_from_one_place(all_jobs):
    for job in all_jobs:
        for group in (job.cluster["headGroupSpec"], *job.cluster["workerGroupSpecs"]):
            assert not group.get("resources") and "labels" not in group["rayStartParams"]


def test_a_job_starts_with_one_cpu_node_and_may_grow(all_jobs):
    """KubeRay submits the job when `replicas` pods of each group are ready."""
    for job in all_jobs:
        for group in job.cluster["workerGroupSpecs"]:
            first = {"cpu": 1, "gpu": 0}[group["groupName"]]
            assert first == group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def test_no_cluster_needs_a_feature_that_is_off_by_default(all_jobs):
    for job in all_jobs:
        assert not {"networkPolicy", "tlsOptions", "historyServerOptions"} & set(job.cluster)


def test_the_disruption_budget_of_a_raycluster_is_a_whole_number(rendered):
    """Kubernetes accepts nothing else where the pods' controller has no scale subresource."""
    assert set(definition("RayCluster")["subresources"]) == {"status"}
    budget = named(rendered("nightly"), "PodDisruptionBudget")["padim-ray-head"]["spec"]
    assert isinstance(budget["minAvailable"], int) and "maxUnavailable" not in budget


def test_finished_jobs_delete_their_cluster_first_and_later_themselves(all_jobs):
    """Every end has its rules; after the failure of a job its deployment has failed as well."""
    for job in all_jobs:
        assert "shutdownAfterJobFinishes" not in job.spec  # KubeRay refuses both together
        delays = {}
        for rule in job.spec["deletionStrategy"]["deletionRules"]:
            condition = dict(rule["condition"])
            seconds = condition.pop("ttlSeconds")
            ((status, value),) = condition.items()
            delays.setdefault((status, value), {})[rule["policy"]] = seconds
        assert set(delays) == {("jobStatus", "SUCCEEDED"), ("jobDeploymentStatus", "Failed")}
        for each in delays.values():
            assert 60 <= each["DeleteCluster"] <= 600 < 7 * 86400 <= each["DeleteSelf"]
