"""Which addresses of the node or the cloud pods can reach."""

import re
from functools import cache

import pytest
from botocore.utils import ContainerMetadataFetcher
from google.auth.compute_engine import _metadata

from tests.infra.manifests import ROOT, jobs, named, render_for

DNS_CACHE = ("169.254.20.10", 53)


def reachable(documents, group):
    """Link-local addresses and ports that the policies let the pods of a group reach."""
    (job,) = jobs(documents)
    labels = next(pod.labels(job) for pod in job.pods if pod.group == group)
    return {
        (block["ipBlock"]["cidr"].partition("/")[0], port["port"])
        for policy in named(documents, "NetworkPolicy").values()
        if policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        for rule in policy["spec"].get("egress", [])
        for block in rule.get("to", [])
        if "ipBlock" in block
        for port in rule["ports"]
    }


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """A function that returns the nightly documents on a cloud."""
    return cache(lambda cloud: render_for(cloud, "nightly", tmp_path_factory.mktemp(cloud)))


@pytest.mark.parametrize("group", ["headgroup", "cpu", "gpu"])
def test_rays_nodes_reach_the_agent_of_eks_pod_identity_and_no_metadata(on, group):
    found = reachable(on("eks"), group) - {DNS_CACHE}
    assert found == {("169.254.170.23", 80), ("fd00:ec2::23", 80)}
    # where botocore accepts an agent; a third address is that of ECS
    assert {address for address, _ in found} <= set(ContainerMetadataFetcher._ALLOWED_HOSTS)


@pytest.mark.parametrize("group", ["headgroup", "cpu", "gpu"])
def test_rays_nodes_reach_the_metadata_server_of_gke(on, group):
    found = reachable(on("gke"), group)
    assert (_metadata._GCE_DEFAULT_MDS_IP, 80) in found
    assert found - {DNS_CACHE, ("169.254.169.254", 53)} == {
        ("169.254.169.254", 80),
        ("169.254.169.252", 988),
    }


@pytest.mark.parametrize("cloud", ["eks", "gke", "minio"])
def test_submitters_have_no_credentials_and_reach_none(on, cloud):
    assert {port for _, port in reachable(on(cloud), "submitter")} == {53}


def test_elsewhere_no_pod_reaches_the_metadata(on):
    for group in ("headgroup", "cpu", "gpu"):
        assert reachable(on("minio"), group) == {DNS_CACHE}


def test_heads_reach_the_pushgateway_where_the_readme_puts_it(rendered):
    readme = (ROOT / "infra/README.md").read_text()
    ((name, port),) = set(re.findall(r"PADIM_RAY_PUSHGATEWAY=http://\w+\.(\w+):(\d+)", readme))
    rules = named(rendered("nightly"), "NetworkPolicy")["padim-ray-head"]["spec"]["egress"]
    assert {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}],
        "ports": [{"protocol": "TCP", "port": int(port)}],
    } in rules
