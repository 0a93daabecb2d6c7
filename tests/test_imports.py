"""Ray is the pipelines' alone: mathematics, models and reports work without it."""

import pkgutil
import subprocess
import sys

import padim_ray

WITH_RAY = {"pipeline", "cli"}
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "ray" not in sys.modules, name
"""


def test_only_pipelines_and_the_command_line_import_ray():
    modules = {module.name for module in pkgutil.iter_modules(padim_ray.__path__)} - WITH_RAY
    names = [f"padim_ray.{name}" for name in sorted(modules - {"kernels"})]  # it wants Triton
    assert len(names) > 30
    subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], check=True)
