"""The rooms of the package: which may import which, and that Ray stays in the pipeline."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "padim_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
# each may import itself and those before it
ROOMS = (
    *("redaction", "errors", "storage", "images", "features", "densities", "scoring", "runs"),
    *("model", "evaluation", "report", "planning", "pipeline", "console", "cli"),
)
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "ray" not in sys.modules, name
"""


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports: of modules, and of what is in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path.parent == PACKAGE and path.stem == "__init__":
        return  # the front door loads from every room, when asked
    mine = room_of(module_of(path))
    for name in imports(path):
        if name.startswith("padim_ray.") and room_of(name) != "__version__":
            assert ROOMS.index(room_of(name)) <= ROOMS.index(mine), f"{mine} imports {name}"


def test_every_room_is_in_the_order_and_says_what_it_is_for():
    there = {room_of(module_of(path)) for path in FILES if module_of(path) != "padim_ray"}
    assert there == set(ROOMS)
    for folder in {path.parent for path in FILES}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_only_the_gaussian_s_own_files_import_its_modules():
    inside = PACKAGE / "densities/gaussian"
    modules = {f"padim_ray.densities.gaussian.{path.stem}" for path in inside.glob("*.py")}
    for path in FILES:
        if inside not in path.parents:
            here = {name.rpartition(".")[0] for name in imports(path)} | {*imports(path)}
            assert not here & modules, path
            if "densities" not in path.parts:  # other densities may build on the package
                assert "padim_ray.densities.gaussian" not in here, path


def test_only_features_know_a_trunk_by_name():
    for path in FILES:
        if "features" not in path.relative_to(PACKAGE).parts:
            assert "resnet" not in path.read_text().lower(), path


def test_what_is_private_in_ray_is_used_in_one_module():
    for path in FILES:
        if path.stem != "ray_internals":
            private = [name for name in imports(path) if name.startswith("ray.") and "._" in name]
            assert not private, path
            assert not re.search("[a-z]_internal\\b|_internal_", path.read_text()), path


def test_only_the_pipeline_imports_ray():
    for path in FILES:
        if "pipeline" not in path.relative_to(PACKAGE).parts:
            assert not [name for name in imports(path) if name.split(".")[0] == "ray"], path


def test_without_the_pipeline_ray_is_not_even_loaded():
    wants_triton = {"kernels"}
    names = [
        module_of(path)
        for path in FILES
        if path.stem not in wants_triton and room_of(f"{module_of(path)}.x") != "pipeline"
    ]
    assert len(names) > 60
    subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], check=True)
