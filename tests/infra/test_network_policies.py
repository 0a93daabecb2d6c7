"""Who may talk to whom, judged as Kubernetes does."""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest

from tests.infra.manifests import named

OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/instance": "kuberay"}


@dataclass(frozen=True)
class Peer:
    """A pod, by its labels and namespace, or an address outside the cluster."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def selects(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def matches(rule, peer):
    if "ipBlock" in rule:
        return bool(peer.address) and ip_address(peer.address) in ip_network(
            rule["ipBlock"]["cidr"]
        )
    if peer.address:
        return False
    namespace = rule.get(
        "namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "padim-ray"}}
    )
    return selects(namespace, {"kubernetes.io/metadata.name": peer.namespace}) and selects(
        rule.get("podSelector", {}), peer.labels
    )


def allowed(policies, direction, pod, peer, port, protocol="TCP"):
    """Whether traffic between a pod of ours and a peer passes; direction: Ingress or Egress."""
    applying = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    if not applying:
        return True
    return any(
        ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        and (peers not in rule or any(matches(each, peer) for each in rule[peers]))
        for spec in applying
        for peers in ["from" if direction == "Ingress" else "to"]
        for rule in spec.get(direction.lower(), [])
    )


@pytest.fixture(scope="module")
def policies(rendered):
    return list(named(rendered("nightly"), "NetworkPolicy").values())


@pytest.fixture(scope="module")
def ours(all_jobs):
    """Our pods by group, of a job with all of them."""
    job = all_jobs[-1]
    return {pod.group: Peer("padim-ray", pod.labels(job)) for pod in job.pods}


def test_our_pods_reach_each_other(policies, ours):
    for source in ours.values():
        for target in ours.values():
            for port in (6379, 8265, 10002):
                assert allowed(policies, "Egress", source, target, port)
                assert allowed(policies, "Ingress", target, source, port)


def test_every_pod_of_ours_is_closed_to_strangers(policies, ours):
    for pod in ours.values():
        for stranger in (
            Peer("default", {"app": "shop"}),
            Peer("default", pod.labels),  # the same labels elsewhere
            Peer("padim-ray", {"app": "debug"}),
            Peer(address="203.0.113.7"),
        ):
            for port in (22, 6379, 8080, 8265, 10001):
                assert not allowed(policies, "Ingress", pod, stranger, port)


def test_the_operator_reaches_the_heads_jobs_and_nothing_else(policies, ours):
    operator = Peer("kuberay-system", OPERATOR)
    for group, pod in ours.items():
        assert allowed(policies, "Ingress", pod, operator, 8265) == (group == "headgroup")
        assert not allowed(policies, "Ingress", pod, operator, 10001)


def test_prometheus_reaches_metrics_and_nothing_else(policies, ours):
    prometheus = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
    for group, pod in ours.items():
        assert allowed(policies, "Ingress", pod, prometheus, 8080) == (group != "submitter")
        assert not allowed(policies, "Ingress", pod, prometheus, 8265)


def test_every_pod_resolves_names_and_reaches_the_bucket(policies, ours):
    for pod in ours.values():
        for protocol in ("UDP", "TCP"):
            for server in (
                Peer("kube-system", {"k8s-app": "kube-dns"}),
                Peer(address="169.254.20.10"),
            ):
                assert allowed(policies, "Egress", pod, server, 53, protocol)
        assert allowed(policies, "Egress", pod, Peer(address="198.51.100.1"), 443)


def test_nothing_else_is_reached(policies, ours):
    for group, pod in ours.items():
        assert not allowed(policies, "Egress", pod, Peer("shop", {"app": "database"}), 5432)
        assert not allowed(policies, "Egress", pod, Peer(address="169.254.169.254"), 80)
        # the autoscaler's Kubernetes
        kubernetes = Peer(address="198.51.100.2")
        assert allowed(policies, "Egress", pod, kubernetes, 6443) == (group == "headgroup")
