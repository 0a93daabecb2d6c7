"""Paths, links, names and sizes in infra/README.md match the files."""

import re

import pytest

from tests.infra.manifests import KUBERAY, ROOT, named, quantity

README = ROOT / "infra/README.md"
GIB = 2**30


@pytest.fixture(scope="module")
def commands() -> str:
    return "\n".join(re.findall(r"^ *```\n(.*?)^ *```", README.read_text(), re.M | re.S))


def test_every_path_in_a_command_exists(commands):
    paths = set(re.findall(r"(?<![\w/])(?:infra|docs|tests)/[\w./-]+", commands))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_link_leads_somewhere():
    text = README.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        if not target:
            assert anchor in anchors, link
        elif not target.startswith("https://"):
            assert (README.parent / target).is_file(), link


def test_every_label_that_a_command_selects_has_documents(commands, rendered):
    found = re.findall(r"apply -k infra/kuberay/overlays/(\w+) -l (.+)$", commands, re.M)
    assert len(found) == 4
    for overlay, selector in found:
        labels = {each["metadata"]["labels"]["padim-ray/apply"] for each in rendered(overlay)}
        wanted = re.findall(r"padim-ray/apply(?:=| in \()([\w, ]+)", selector)[0].split(", ")
        assert set(wanted) <= labels


def test_names_in_commands_match_the_manifests(commands, rendered):
    jobs = {
        name
        for overlay in ("gpu", "nightly")
        for kind in ("RayJob", "RayCronJob")
        for name in named(rendered(overlay), kind)
    }
    accounts = set(named(rendered("gpu"), "ServiceAccount"))
    assert set(re.findall(r"\bpadim-(?:fit|score|nightly)\b", commands)) == jobs
    assert set(re.findall(r"\bpadim-ray-(?:head|worker)\b", commands)) == accounts
    assert {"padim-ray"} == set(re.findall(r"kubectl -n (\S+)", commands))


def test_the_operator_is_installed_where_the_network_policy_expects_it(commands, rendered):
    (namespace,) = re.findall(r"helm install kuberay-operator .*?--namespace (\S+)", commands, re.S)
    (rule,) = named(rendered("gpu"), "NetworkPolicy")["padim-ray-head"]["spec"]["ingress"]
    labels = rule["from"][0]["namespaceSelector"]["matchLabels"]
    assert labels == {"kubernetes.io/metadata.name": namespace}


def test_the_table_of_nodes_lists_the_pods_requests(all_jobs):
    rows = re.findall(r"^\| (head|CPU|GPU)\b[^|]*\| ([^|]* GiB disk) \|", README.read_text(), re.M)
    listed = {
        group: dict(reversed(part.split(" ", 1)) for part in cell.split(", "))
        for group, cell in rows
    }
    (job,) = [job for job in all_jobs if job.name.startswith("padim-nightly")]
    for pod in job.ray_pods:
        resources = [pod.container["resources"]["requests"]]
        if pod.group == "headgroup":
            resources.append(job.cluster["autoscalerOptions"]["resources"]["requests"])
        cell = listed[{"headgroup": "head", "cpu": "CPU", "gpu": "GPU"}[pod.group]]
        assert sum(quantity(each["cpu"]) for each in resources) == quantity(cell["CPUs"])
        assert sum(quantity(each["memory"]) for each in resources) == quantity(cell["GiB"]) * GIB
        disk = quantity(resources[0]["ephemeral-storage"])
        assert disk == quantity(cell["GiB disk"]) * GIB
        assert quantity(resources[0].get("nvidia.com/gpu", 0)) == quantity(cell.get("GPU", 0))


def test_every_directory_in_the_overview_exists():
    overview = re.findall(r"^```\n(infra/\n.*?)^```", README.read_text(), re.M | re.S)[0]
    for name in re.findall(r"^ {4}(\w+)/ ", overview, re.M):
        assert (KUBERAY / name).is_dir()
    for name in ("cpu", "gpu", "nightly"):
        assert name in overview and (KUBERAY / "overlays" / name).is_dir()
    for name in ("gpu", "rayjob", "eks", "gke", "minio"):
        assert name in overview and (KUBERAY / "components" / name).is_dir()
