"""The image, built by buildah from the Dockerfile, on Debian in place of Ray's image.

What takes long is kept in build/containers: wheels, Debian, and the layers of the images.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.infra.containers.context import copy_context
from tests.infra.manifests import ROOT

FOLDER = ROOT / "build/containers"
STORAGE = [f"--root={FOLDER}/storage", f"--runroot={FOLDER}/run", "--storage-driver=overlay"]
PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
DEBIAN = "bookworm"  # its Python is that of Ray's image
PYTHON = (3, 11)
BASE = "localhost/padim-ray-base"


def run(*command: object) -> str:
    """Run a program that must succeed, and return its output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(context: Path) -> str:
    """Build the image that `make image` would tag, and return its name.

    Args:
        context: an empty folder for the build context.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)} (Debian has packages of these names)")
    if sys.version_info[:2] != PYTHON:
        pytest.skip("wheels are downloaded for the running Python, and the image has 3.11")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "pip.conf").write_text(
        "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
    )
    _download_wheels()
    _make_debian()
    command = run("make", "--dry-run", f"--directory={ROOT}", "image", "REGISTRY=localhost")
    found = re.search(r"docker build --file (\S+) (.+) \.$", command, re.S | re.M)
    dockerfile, options = found[1], shlex.split(found[2].replace("\\\n", ""))
    (ray,) = re.findall(r"RAY_VERSION=(\S+)", command)
    (name,) = re.findall(r"--tag (\S+)", command)
    base = ROOT / "tests/infra/containers/base.Dockerfile"
    _build("--tag", BASE, "--file", base, "--build-arg", f"RAY_VERSION={ray}", FOLDER / "debian")
    copy_context(context).chmod(0o755)  # the Dockerfile's user reads it
    hashed = f"--build-arg=SOURCE={_hash(context)}"
    _build("--file", ROOT / dockerfile, *options, f"--build-arg=BASE={BASE}", hashed, context)
    return name


def _hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _build(*options: object) -> None:
    mounts = [
        f"--volume={FOLDER}/wheels:/wheels:ro",
        f"--volume={FOLDER}/pip.conf:/etc/pip.conf:ro",
    ]
    run("buildah", *STORAGE, "bud", "--layers", "--isolation=chroot", *mounts, *options)


def _download_wheels() -> None:
    """Download what pip will install in the image, with this machine's pip and its settings."""
    constraints = ROOT / "constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    done, content = FOLDER / "wheels.txt", "\n".join([*wanted, constraints.read_text()])
    if done.exists() and done.read_text() == content:
        return
    where = ["--dest", FOLDER / "wheels", "--constraint", constraints]
    run(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *where, *wanted)
    done.write_text(content)


def _make_debian() -> None:
    archive = FOLDER / "debian/base.tar"
    if archive.exists():
        return
    root = FOLDER / "root"
    shutil.rmtree(root, ignore_errors=True)
    packages = "python3,python3-pip,python3-venv,ca-certificates,tzdata"
    run("debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, root)
    archive.parent.mkdir(exist_ok=True)
    run("tar", "--directory", root, "--create", "--file", f"{archive}.new", ".")
    Path(f"{archive}.new").rename(archive)
    shutil.rmtree(root)
