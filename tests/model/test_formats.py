"""Models of earlier format versions open, and score as they did when they were saved.

`formats/` holds a model in each of them, which `PadimModel.save` wrote, and its scores. The trunk's
weights are left out there; they are computed here.
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

STORED = Path(__file__).parent / "formats"


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


@pytest.fixture(params=["1", "2", "3"])
def stored(request, tmp_path):
    shutil.copytree(STORED / request.param, tmp_path / "model")
    root = Location.of(str(tmp_path / "model"))
    save_trunk_weights(root, trunk_weights())
    return root


@pytest.fixture
def expected():
    return json.loads((STORED / "expected.json").read_text())


def test_an_earlier_model_scores_as_it_did(stored, expected):
    model = PadimModel.load(stored.uri, device="cpu")
    scores = model.score(images(4, 2), group="bolt").scores
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)
    reference = model.calibration("bolt").scores
    np.testing.assert_array_equal(reference, np.float32(expected["leave_one_out"]))
    left_out = model.calibrate(images(9, 1), group="bolt")
    np.testing.assert_allclose(np.sort(left_out), expected["leave_one_out"], rtol=1e-5)


def test_the_density_of_an_earlier_model_is_a_gaussian_per_cell(stored):
    density = open_version(stored).spec.density
    assert density.to_json() == {
        "kind": "gaussian",
        "regularization": {"kind": "shrink", "shrinkage": 0.2, "ridge": 0.01, "epsilon": 0.01},
    }


def test_an_earlier_model_has_the_papers_cells(stored):
    spec = open_version(stored).spec
    assert (spec.stride, spec.neighbourhood, spec.score_share) == (4, 1, 0.0)
    assert (spec.search, spec.search_maps) == (0, False)


def test_an_earlier_model_can_be_updated_and_is_saved_in_the_present_format(stored, expected):
    model = PadimModel.load(stored.uri, device="cpu")
    assert open_version(stored).load_manifest().num_rows == 0
    model.update(images(3, 5), group="bolt")
    assert model.save(stored.uri) == 2
    content = json.loads((stored / "versions/000002/model.json").read())
    assert content["format_version"] == 4
    assert content["spec"]["density"]["kind"] == "gaussian"
    assert open_version(stored).groups["bolt"].images == expected["count"] + 3
