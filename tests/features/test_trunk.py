import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from padim_ray.errors import ModelError
from padim_ray.features.trunk import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Trunk,
    choose_channels,
    native_precision,
)
from padim_ray.features.trunks import resnet
from padim_ray.features.trunks.resnet import BACKBONES, STRIDES
from padim_ray.features.weights import read_weights, weights_sha256

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
        for name in BACKBONES
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
        rounding = 1e-4 * expected.abs().max().item()  # of values that a hundred layers enlarge
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=rounding)


def test_an_image_has_the_same_features_in_any_company(weights):
    channels = choose_channels("resnet18", LAYERS, 40, seed=7)
    trunk = Trunk("resnet18", channels, read_weights(weights, "resnet18", LAYERS))
    together = trunk(images(9))
    for size in (1, 2, 5):
        parts = zip(*map(trunk, images(9).split(size)), strict=True)
        for level, part in zip(together, parts, strict=True):
            torch.testing.assert_close(torch.cat(part), level, rtol=1e-6, atol=1e-7)


def test_the_backbones_are_torchvisions():
    families = ("resnet", "resnext", "wide_resnet")
    names = [name for name in torchvision.models.list_models() if name.startswith(families)]
    assert sorted(BACKBONES) == sorted(names)
    for name, backbone in BACKBONES.items():
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        shapes = {
            key: tensor.shape for key, tensor in model.state_dict().items() if "fc" not in key
        }
        built = resnet.build(name, list(STRIDES)).state_dict()
        assert {key: tensor.shape for key, tensor in built.items()} == shapes
        outputs = [built[f"layer{n}.0.downsample.1.weight"].shape[0] for n in (2, 3, 4)]
        assert list(backbone.channels.values())[1:] == outputs


def test_a_model_is_built_without_torchvision(weights):
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


def test_channels_are_drawn_by_the_seed():
    drawn = choose_channels("resnet18", LAYERS, 100, seed=42)
    assert drawn == choose_channels("resnet18", LAYERS, 100, seed=42)
    assert drawn != choose_channels("resnet18", LAYERS, 100, seed=43)
    assert sum(map(len, drawn.values())) == 100


@pytest.mark.parametrize(
    ("backbone", "kept"),
    [("resnet18", 448), ("resnet34", 448), ("resnet50", 550), ("wide_resnet50_2", 550)],
)
def test_the_default_keeps_all_channels_of_the_small_backbones(backbone, kept):
    assert sum(map(len, choose_channels(backbone, LAYERS, None, 42).values())) == kept


@pytest.mark.parametrize("n_features", [0, 449])
def test_more_channels_than_there_are_are_refused(n_features):
    with pytest.raises(ModelError, match="between 1 and 448"):
        choose_channels("resnet18", LAYERS, n_features, 42)


def test_the_same_weights_have_the_same_hash_in_every_container(weights, tmp_path):
    state = read_weights(weights, "resnet18", LAYERS)
    safetensors.torch.save_file(state, tmp_path / "trunk.safetensors")
    again = read_weights(str(tmp_path / "trunk.safetensors"), "resnet18", LAYERS)
    assert weights_sha256(state) == weights_sha256(again)
    state["conv1.weight"] = state["conv1.weight"] + 1e-6
    assert weights_sha256(state) != weights_sha256(again)


def test_a_trunk_without_classifier_is_enough(weights, tmp_path):
    state = read_weights(weights, "resnet18", LAYERS)
    assert not any(name.startswith(("layer4", "fc")) for name in state)
    torch.save(state, tmp_path / "trunk.pth")
    assert read_weights(str(tmp_path / "trunk.pth"), "resnet18", LAYERS).keys() == state.keys()


def test_missing_tensors_are_named(weights, tmp_path):
    state = read_weights(weights, "resnet18", LAYERS)
    del state["layer2.0.conv1.weight"], state["bn1.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ModelError, match=r"lack 2 of .* bn1.bias, layer2.0.conv1.weight"):
        read_weights(str(tmp_path / "part.pth"), "resnet18", LAYERS)


def test_wrong_shapes_are_named(weights):
    with pytest.raises(ModelError, match=r"lack \d+ of|don't fit .* is \(64, "):
        read_weights(weights, "wide_resnet50_2", LAYERS)
    with pytest.raises(ModelError, match="The weights lack"):
        read_weights(weights, "resnet34", LAYERS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pth", None, "no weights at"),
        ("text.pth", b"hello", "no plain state dict"),
        ("text.safetensors", b"hello", "no plain state dict"),
        ("IMAGENET1K_V9", None, "neither a .pth .* known are IMAGENET1K_V1"),
    ],
)
def test_unusable_weights_are_named(tmp_path, name, content, message):
    source = str(tmp_path / name) if "." in name else name
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_weights(source, "resnet18", LAYERS)


def test_a_pickle_of_code_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"conv1.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ModelError, match="no plain state dict"):
        read_weights(str(tmp_path / "hostile.pth"), "resnet18", LAYERS)
    assert not (tmp_path / "ran").exists()


def test_the_processors_precision_is_one_of_two():
    assert native_precision("cpu") in ("float32", "bfloat16")
