"""The build context: the files of the repository that .dockerignore lets through."""

import fnmatch
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.infra.manifests import ROOT

RULES = [
    rule
    for rule in (ROOT / ".dockerignore").read_text().splitlines()
    if rule and not rule.startswith("#")
]


def sent(path: Path) -> bool:
    """Whether .dockerignore lets a path of the repository into the build context."""
    whole = [str(path), *(str(parent) for parent in path.parents if parent.name)]
    kept = True
    for rule in RULES:
        pattern = rule.removeprefix("!").removeprefix("**/")
        names = path.parts if rule.startswith("**/") else whole
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            kept = rule.startswith("!")
    return kept


def copy_context(folder: Path) -> Path:
    """Copy the build context that `docker build` would send into a folder."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude=/build/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("this is not a git repository")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and sent(Path(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder
