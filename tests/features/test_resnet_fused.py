"""Fused trunks compared with PyTorch's modules."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.features.trunk import Trunk
from padim_ray.features.trunks import choose_channels, find_trunk
from padim_ray.features.weights import read_weights
from tests.features.test_trunk import randomise

SMALL = ["resnet18", "resnet50", "resnext50_32x4d"]
LAYERS = [["layer1"], ["layer1", "layer2", "layer3"], ["layer2", "layer4"]]


@st.composite
def trunks(draw):
    """A random fused trunk with some of the channels, and one of modules with all of them."""
    backbone = draw(st.sampled_from(SMALL))
    widths = {name: level.channels for name, level in find_trunk(backbone).levels.items()}
    channels = {}
    for layer in draw(st.sampled_from(LAYERS)):
        indices = list(range(widths[layer]))
        few = st.lists(st.sampled_from(indices), unique=True, max_size=20).map(sorted)
        channels[layer] = draw(st.one_of(st.just(indices), few))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    state_dict = randomise(torchvision.models.get_model(backbone)).state_dict()
    every = {layer: range(widths[layer]) for layer in channels}
    return Trunk(backbone, channels, state_dict), Trunk(backbone, every, state_dict, fuse=False)


def random_images(count, height, width):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@settings(max_examples=20, deadline=None)
@given(trunks(), st.integers(1, 11), st.sampled_from([(64, 64), (32, 96)]), st.booleans())
def test_float32_features_equal_the_modules(both, count, size, as_floats):
    trunk, every = both
    images = random_images(count, *size)
    assert trunk.fused is not None
    fused = trunk(images.float() if as_floats else images)
    levels = zip(fused, trunk.channels.values(), every(images), strict=True)
    for level, kept, expected in levels:
        atol = 1e-5 * float(expected.abs().max())  # errors are relative to the largest channel
        torch.testing.assert_close(level, expected[:, kept], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("n_features", ["all", 100])
def test_bfloat16_features_are_no_further_from_float32_than_the_modules(weights, n_features):
    layers = LAYERS[1]
    channels = choose_channels("resnet18", layers, n_features, 42)
    state = read_weights(weights, "resnet18", layers)
    images = random_images(8, 96, 64)
    exact = Trunk("resnet18", channels, state, fuse=False)(images)
    rounded, modules = (
        Trunk("resnet18", channels, state, precision="bfloat16", fuse=fuse)(images)
        for fuse in (True, False)
    )
    for level, fused, plain in zip(exact, rounded, modules, strict=True):
        assert fused.dtype == torch.bfloat16
        assert (fused - level).norm() < 1.05 * (plain - level).norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_do_not_depend_on_the_rest_of_the_batch_bit_for_bit(weights, precision):
    channels = choose_channels("resnet18", LAYERS[1], 100, 42)
    state = read_weights(weights, "resnet18", LAYERS[1])
    trunk = Trunk("resnet18", channels, state, precision=precision)
    images = random_images(19, 64, 64)
    batch = trunk(images)
    trunk(random_images(19, 64, 64))
    for sizes in ([1, 18], [5, 7, 7], [9, 10]):
        parts_of_levels = zip(*map(trunk, images.split(sizes)), strict=True)
        for level, parts in zip(batch, parts_of_levels, strict=True):
            assert torch.equal(torch.cat(parts), level)


def test_without_the_operators_the_modules_are_used(weights, monkeypatch):
    monkeypatch.setattr("padim_ray.features.trunks.resnet_fused.ONEDNN", ("of_another_pytorch",))
    channels = choose_channels("resnet18", ["layer1"], 3, 42)
    state = read_weights(weights, "resnet18", ["layer1"])
    trunk, modules = (Trunk("resnet18", channels, state, fuse=fuse) for fuse in (True, False))
    images = random_images(3, 64, 64)
    assert trunk.fused is None
    assert all(map(torch.equal, trunk(images), modules(images)))
