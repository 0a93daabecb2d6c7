import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from padim_ray.features.trunk import Trunk, native_precision
from padim_ray.features.trunks import choose_channels
from padim_ray.features.trunks.base import IMAGENET_MEAN, IMAGENET_STD
from padim_ray.features.trunks.resnet import RESNETS
from padim_ray.features.weights import read_weights

LAYERS = ["layer1", "layer2", "layer3"]


def images(count=2, size=64):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), np.uint8))


def randomise(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "101" in name or "152" in name else [])
        for name in [resnet.name for resnet in RESNETS]
    ],
)
def test_features_equal_those_of_the_whole_torchvision_model(backbone):
    torch.manual_seed(1)
    model = randomise(torchvision.models.get_model(backbone))
    channels = choose_channels(backbone, LAYERS, 40, seed=7)
    trunk = Trunk(backbone, channels, model.state_dict())
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        whole = create_feature_extractor(model, LAYERS)((images() / 255 - mean) / std)
    for layer, features in zip(LAYERS, trunk(images()), strict=True):
        expected = whole[layer][:, channels[layer]]
        rounding = 1e-4 * expected.abs().max().item()  # errors grow with the layers
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=rounding)


def test_features_do_not_depend_on_the_rest_of_the_batch(weights):
    channels = choose_channels("resnet18", LAYERS, 40, seed=7)
    trunk = Trunk("resnet18", channels, read_weights(weights, "resnet18", LAYERS))
    batch = trunk(images(9))
    for size in (1, 2, 5):
        parts = zip(*map(trunk, images(9).split(size)), strict=True)
        for level, part in zip(batch, parts, strict=True):
            torch.testing.assert_close(torch.cat(part), level, rtol=1e-6, atol=1e-7)


def test_all_of_torchvisions_resnets_are_trunks():
    families = ("resnet", "resnext", "wide_resnet")
    names = [name for name in torchvision.models.list_models() if name.startswith(families)]
    assert sorted(resnet.name for resnet in RESNETS) == sorted(names)
    for resnet in RESNETS:
        with torch.device("meta"):
            model = torchvision.models.get_model(resnet.name)
        shapes = {
            key: tensor.shape for key, tensor in model.state_dict().items() if "fc" not in key
        }
        built = resnet.build(list(resnet.levels)).state_dict()
        assert {key: tensor.shape for key, tensor in built.items()} == shapes
        outputs = [built[f"layer{n}.0.downsample.1.weight"].shape[0] for n in (2, 3, 4)]
        assert [level.channels for level in resnet.levels.values()][1:] == outputs


def test_trunks_are_built_without_importing_torchvision(weights):
    code = f"""
import sys
from padim_ray.features.trunk import Trunk
from padim_ray.features.weights import read_weights
import padim_ray.pipeline.jobs.fit, padim_ray.pipeline.jobs.score

channels = {{"layer1": [0], "layer3": [5]}}
Trunk("resnet18", channels, read_weights({str(weights)!r}, "resnet18", list(channels)))
assert not {{"torchvision", "torch._dynamo"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_layers_up_to_the_deepest_are_built(weights):
    trunk = Trunk(
        "resnet18", {"layer1": [0]}, read_weights(weights, "resnet18", ["layer1"]), fuse=False
    )
    assert [name for name, _ in trunk.stages.named_children()][-1] == "layer1"


def test_bfloat16_features_are_close(weights):
    state = read_weights(weights, "resnet18", LAYERS)
    channels = choose_channels("resnet18", LAYERS, "all", 0)
    exact = Trunk("resnet18", channels, state)(images())
    rounded = Trunk("resnet18", channels, state, precision="bfloat16")(images())
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b).abs().mean() < 0.02 * a.abs().mean()


def test_the_native_precision_is_one_of_two():
    assert native_precision("cpu") in ("float32", "bfloat16")
