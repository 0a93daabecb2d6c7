"""A model of format version 1 opens, and scores as it did when it was saved.

`format_1/` holds a model that `PadimModel.save` wrote, and its scores. The trunk's weights are left
out there; they are computed here.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from padim_ray import PadimModel
from padim_ray.features.trunks import find_trunk
from padim_ray.model.publish import save_trunk_weights
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location

STORED = Path(__file__).parent / "format_1"


def pattern(shape, step, modulus):
    """Integers that are the same on every machine."""
    count = int(np.prod(shape))
    return (torch.arange(count) * step % modulus).reshape(shape)


def trunk_weights():
    state = {}
    for name, tensor in find_trunk("resnet18").build(["layer1"]).state_dict().items():
        if tensor.ndim == 4:
            state[name] = (pattern(tensor.shape, 7919, 1009) - 504).float() / 8192
        elif name.endswith(("running_var", "weight")):
            state[name] = torch.ones(tensor.shape)
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(tensor.shape)
    return state


def images(count, seed):
    return pattern((count, 3, 32, 32), 6151 + 2 * seed, 251).to(torch.uint8)


@pytest.fixture
def stored(tmp_path):
    shutil.copytree(STORED / "model", tmp_path / "model")
    root = Location.of(str(tmp_path / "model"))
    save_trunk_weights(root, trunk_weights())
    return root


@pytest.fixture
def expected():
    return json.loads((STORED / "expected.json").read_text())


def test_a_format_1_model_scores_as_it_did(stored, expected):
    model = PadimModel.load(stored.uri, device="cpu")
    scores = model.score(images(4, 2), group="bolt").scores
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)
    reference = model.calibration("bolt").scores
    np.testing.assert_array_equal(reference, np.float32(expected["leave_one_out"]))
    left_out = model.calibrate(images(9, 1), group="bolt")
    np.testing.assert_allclose(np.sort(left_out), expected["leave_one_out"], rtol=1e-5)


def test_the_density_of_a_format_1_model_is_a_gaussian_per_cell(stored):
    density = open_version(stored).spec.density
    assert density.to_json() == {
        "kind": "gaussian",
        "regularization": {"kind": "shrink", "shrinkage": 0.2, "ridge": 0.01, "epsilon": 0.01},
    }


def test_a_format_1_model_can_be_updated_and_is_saved_in_format_2(stored, expected):
    model = PadimModel.load(stored.uri, device="cpu")
    model.update(images(3, 5), group="bolt")
    assert model.save(stored.uri) == 2
    content = json.loads((stored / "versions/000002/model.json").read())
    assert content["format_version"] == 2
    assert content["spec"]["density"]["kind"] == "gaussian"
    assert open_version(stored).groups["bolt"].images == expected["count"] + 3
