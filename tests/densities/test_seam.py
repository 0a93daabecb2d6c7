"""The seam: a density that is registered works like the others, from fit to leave-one-out."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from padim_ray import ModelError, PadimModel
from padim_ray.densities import DENSITIES, density_class, density_of_json
from padim_ray.model.version import open_named
from tests.model.test_padim_model import images

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
MODULE = "padim_ray.densities.centre"
SETTINGS = {
    **{"density": "centre", "image_size": 64, "n_features": 20, "precision": "float32"},
    **{"stride": 4, "neighbourhood": 1},  # levels of three grids
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The example of CONTRIBUTING.md, as if it were in its place."""
    (code,) = re.findall(r"densities/centre.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setitem(DENSITIES, "centre", MODULE)
    exec(code, module.__dict__)


@pytest.fixture
def model(weights):
    model = PadimModel(weights=weights, **SETTINGS)
    model.update(images(0, 6))
    model.update(images(1, 5))
    return model


def test_distances_of_a_new_density_make_the_maps(model):
    train, test = torch.cat([images(0, 6), images(1, 5)]), images(2, 3)
    fitted, scored = (model._detector.embedder.trunk(part) for part in (train, test))
    squared = torch.zeros(3, 16, 16, device=fitted[0].device)
    for mean, level in zip((level.mean(0) for level in fitted), scored, strict=True):
        squares = (level - mean).square().sum(1)
        spread = 16 // squares.shape[1]
        squared += squares.repeat_interleave(spread, 1).repeat_interleave(spread, 2)
    expected = model.spec.mapper.maps(squared.sqrt())
    torch.testing.assert_close(model.score(test).maps, expected.cpu(), rtol=1e-4, atol=1e-5)


def test_a_new_density_is_saved_loaded_and_updated(model, weights, tmp_path):
    model.save(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model/versions/000001/groups/default").iterdir()}
    assert names == {
        "sums-00000-of-00001.safetensors",
        "centre-00000-of-00001.safetensors",
    }
    loaded = PadimModel.load(str(tmp_path / "model"))
    assert torch.equal(loaded.score(images(2, 3)).maps, model.score(images(2, 3)).maps)
    for each in (loaded, model):
        each.update(images(3, 4))
    torch.testing.assert_close(loaded.score(images(2, 3)).maps, model.score(images(2, 3)).maps)


def test_a_new_density_is_calibrated_by_leave_one_out(model, weights):
    train = torch.cat([images(0, 6), images(1, 5)])
    scores = model.calibrate(train)
    for left_out in (0, 10):
        other = PadimModel(weights=weights, **SETTINGS)
        other.update(torch.cat([train[:left_out], train[left_out + 1 :]]))
        expected = other.score(train[left_out : left_out + 1]).scores.item()
        assert scores[left_out].item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(model.calibration().scores, np.sort(scores.numpy()))


def test_settings_of_a_new_density_are_read_from_model_json(model, tmp_path):
    model.save(str(tmp_path / "model"))
    assert open_named(str(tmp_path / "model")).spec.density == density_class("centre")()
    with pytest.raises(ModelError, match=r"spec\.density has no settings"):
        density_of_json({"kind": "centre", "x": 1}, "spec.density")


def test_an_unknown_density_is_refused(weights):
    with pytest.raises(ModelError, match="Unknown density 'flow'; known are gaussian, shared"):
        PadimModel(weights=weights, density="flow")
