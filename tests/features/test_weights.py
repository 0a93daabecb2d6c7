"""Reading a trunk's weights from files and by name."""

import pytest
import safetensors.torch
import torch

from padim_ray.errors import ModelError
from padim_ray.features.weights import read_weights, weights_sha256

LAYERS = ["layer1", "layer2", "layer3"]


def test_the_hash_does_not_depend_on_the_files_format(weights, tmp_path):
    state = read_weights(weights, "resnet18", LAYERS)
    safetensors.torch.save_file(state, tmp_path / "trunk.safetensors")
    again = read_weights(str(tmp_path / "trunk.safetensors"), "resnet18", LAYERS)
    assert weights_sha256(state) == weights_sha256(again)
    state["conv1.weight"] = state["conv1.weight"] + 1e-6
    assert weights_sha256(state) != weights_sha256(again)


def test_weights_without_deeper_layers_and_classifier_are_enough(weights, tmp_path):
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
