"""The examples of CONTRIBUTING.md are put where they say, and used as they say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"`(padim_ray/\S+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
USE = """
import numpy as np, torch
from padim_ray import PadimModel
from padim_ray.features.trunks import find_trunk

torch.manual_seed(0)
tiny = find_trunk("tiny")
torch.save(tiny.build(["edges", "corners"]).state_dict(), "tiny.pth")
options = dict(backbone="tiny", weights="tiny.pth", image_size=32, density="centre")
model = PadimModel(**options, precision="float32", device="cpu")
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (9, 3, 32, 32), np.uint8)
model.update(images)
left_out = model.calibrate(images)
for index in range(3):
    other = PadimModel(**options, precision="float32", device="cpu")
    other.update(np.delete(images, index, axis=0))
    alone = other.score(images[index : index + 1]).scores
    np.testing.assert_allclose(left_out[index], alone[0], rtol=1e-4)
model.save("model")
loaded = PadimModel.load("model", device="cpu")
assert loaded.spec.density.kind == "centre" and loaded.spec.backbone == "tiny"
np.testing.assert_allclose(loaded.score(images).scores, model.score(images).scores, rtol=1e-6)
"""


@pytest.fixture
def extended(tmp_path):
    """The package with the examples in it."""
    shutil.copytree(ROOT / "padim_ray", tmp_path / "padim_ray")
    assert [name for name, _ in EXAMPLES] == [
        "padim_ray/densities/centre.py",
        "padim_ray/features/trunks/tiny.py",
    ]
    for name, code in EXAMPLES:
        (tmp_path / name).write_text(code)
    densities = tmp_path / "padim_ray/densities/__init__.py"
    (line,) = re.findall(r'^    "centre": .*\n', PAGE, re.MULTILINE)
    densities.write_text(densities.read_text().replace('    "shared":', line + '    "shared":', 1))
    trunks = tmp_path / "padim_ray/features/trunks/__init__.py"
    (line,) = re.findall(r"^TRUNKS: .*\n", PAGE, re.MULTILINE)
    text = re.sub(r"^TRUNKS: .*\n", line, trunks.read_text(), flags=re.MULTILINE)
    trunks.write_text(f"from padim_ray.features.trunks.tiny import TINY\n{text}")
    return tmp_path


def test_the_examples_work_as_they_are(extended):
    subprocess.run([sys.executable, "-c", USE], cwd=extended, check=True)


def test_the_examples_are_typed_and_formatted(extended):
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        names = [name for name, _ in EXAMPLES]
        config = ["--config", str(ROOT / "pyproject.toml")]
        command = [sys.executable, "-m", *tool, *config, *names]
        subprocess.run(command, cwd=extended, check=True)
