"""Every manifest is valid by Kubernetes' and KubeRay's schemas."""

from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.crds import validator
from tests.infra.manifests import KUBERAY, copy, jobs, named, render_for

KUBERNETES = ("1.29", "1.37")  # the oldest that infra/README.md allows, and the latest


def validate(document):
    if document["apiVersion"] == "ray.io/v1":
        validator(document["kind"]).validate(document)
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(document, version, strict=True)


def test_every_document_is_valid(documents):
    for document in documents:
        validate(document)


def test_the_template_of_a_cluster_is_valid():
    validate(yaml.safe_load((KUBERAY / "base/raycluster.yaml").read_text()))


def test_the_namespace_is_valid():
    validate(yaml.safe_load((KUBERAY / "namespace.yaml").read_text()))


def test_every_pod_is_valid(all_jobs):
    for job in all_jobs:
        for pod in job.pods:
            template = {"apiVersion": "v1", "kind": "Pod", **pod.template}
            validate(template)


@pytest.mark.parametrize("cloud", ["eks", "gke", "minio"])
@pytest.mark.parametrize("overlay", ["gpu", "nightly"])
def test_every_document_is_valid_on(cloud, overlay, tmp_path, rendered):
    documents = render_for(cloud, overlay, tmp_path)
    assert documents != rendered(overlay)
    for document in documents:
        validate(document)


def without_head_template(job):
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]


def with_a_misspelled_field(job):
    job["spec"]["activeDeadlineSecond"] = 60


def with_a_misspelled_field_of_a_pod(job):
    job["spec"]["submitterPodTemplate"]["spec"]["restartPolice"] = "Never"


def with_a_number_as_text(job):
    job["spec"]["backoffLimit"] = "3"


def with_an_unknown_autoscaler(job):
    job["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = "v3"


@pytest.mark.parametrize(
    "spoil",
    [
        without_head_template,
        with_a_misspelled_field,
        with_a_misspelled_field_of_a_pod,
        with_a_number_as_text,
        with_an_unknown_autoscaler,
    ],
)
def test_a_mistake_in_a_rayjob_is_found(spoil, rendered):
    job = copy(named(rendered("gpu"), "RayJob")["padim-score"])
    validate(job)
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        validate(job)


def test_a_mistake_in_a_network_policy_is_found(rendered):
    policy = copy(named(rendered("gpu"), "NetworkPolicy")["padim-ray"])
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(policy)


def test_every_overlay_starts_its_jobs_on_its_groups(rendered):
    for overlay, expected in {
        "cpu": {"padim-fit", "padim-score"},
        "gpu": {"padim-fit", "padim-score"},
        "nightly": {"padim-nightly-29927790"},
    }.items():
        found = list(jobs(rendered(overlay)))
        assert {job.name for job in found} == expected
        groups = {group["groupName"] for job in found for group in job.cluster["workerGroupSpecs"]}
        assert groups == ({"cpu"} if overlay == "cpu" else {"cpu", "gpu"})


def test_all_kustomizations_are_rendered_by_some_test():
    """Each is an overlay, a part of one, or a cloud's component."""
    reached = {Path("base"), Path("jobs"), Path("site"), Path("components/rayjob")}
    reached |= {Path("components") / name for name in ("gpu", "eks", "gke", "minio")}
    reached |= {Path("overlays") / name for name in ("cpu", "gpu", "nightly")}
    assert {
        path.parent.relative_to(KUBERAY) for path in KUBERAY.rglob("kustomization.yaml")
    } == reached
