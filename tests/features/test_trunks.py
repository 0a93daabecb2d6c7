"""The trunks by name, the choice of channels, and the seam: a new trunk works like the others."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from padim_ray import ModelError, PadimModel
from padim_ray.features.trunks import TRUNKS, check_levels, choose_channels, find_trunk
from padim_ray.features.trunks.base import Architecture, Level

LAYERS = ["layer1", "layer2", "layer3"]
CELLS = {"stride": 4, "neighbourhood": 1}


@st.composite
def choices(draw):
    """A trunk, some of its levels in any order, a number of channels and a seed."""
    trunk = find_trunk(draw(st.sampled_from(["resnet18", "resnet34", "resnet50"])))
    levels = draw(st.lists(st.sampled_from(list(trunk.levels)), min_size=1, unique=True))
    total = sum(trunk.levels[level].channels for level in levels)
    return trunk, levels, draw(st.integers(1, total)), draw(st.integers(0, 2**32))


@given(choices())
def test_chosen_channels_are_ascending_distinct_and_as_many_as_asked_for(choice):
    trunk, levels, n_features, seed = choice
    channels = choose_channels(trunk.name, levels, n_features, seed)
    assert list(channels) == [level for level in trunk.levels if level in levels]  # finest first
    assert sum(map(len, channels.values())) == n_features
    for level, kept in channels.items():
        assert kept == sorted(set(kept))
        assert not kept or 0 <= kept[0] <= kept[-1] < trunk.levels[level].channels


@given(choices())
def test_the_seed_decides_which_channels_are_chosen(choice):
    trunk, levels, n_features, seed = choice
    channels = choose_channels(trunk.name, levels, n_features, seed)
    assert channels == choose_channels(trunk.name, list(reversed(levels)), n_features, seed)


def test_another_seed_chooses_other_channels():
    first, other = (choose_channels("resnet18", LAYERS, 100, seed) for seed in (42, 43))
    assert first != other


def test_all_channels_can_be_kept():
    channels = choose_channels("resnet18", LAYERS, "all", seed=0)
    assert [len(kept) for kept in channels.values()] == [64, 128, 256]


@pytest.mark.parametrize(
    ("backbone", "kept"),
    [("resnet18", 448), ("resnet34", 448), ("resnet50", 550), ("wide_resnet50_2", 550)],
)
def test_small_backbones_keep_all_channels_by_default(backbone, kept):
    assert sum(map(len, choose_channels(backbone, LAYERS, None, 42).values())) == kept


@pytest.mark.parametrize("n_features", [0, -1, 449, "many"])
def test_an_impossible_number_of_channels_is_refused(n_features):
    with pytest.raises(ModelError, match="between 1 and 448"):
        choose_channels("resnet18", LAYERS, n_features, 42)


def test_unknown_trunks_and_levels_are_refused():
    with pytest.raises(ModelError, match="Unknown backbone 'vgg16'; known are resnet18"):
        find_trunk("vgg16")
    for levels in (["layer5"], ["layer1", "fc"], []):
        with pytest.raises(ModelError, match="choose among layer1, layer2, layer3, layer4"):
            check_levels("resnet18", levels)


@dataclass(frozen=True, kw_only=True)
class TinyNetwork(Architecture):
    """The smallest trunk: one convolution, and an average over its output."""

    def build(self, levels):
        stages = nn.Sequential()
        stages.add_module("convolution", nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False))
        stages.add_module("norm", nn.BatchNorm2d(5))
        stages.add_module("fine", nn.ReLU())
        if "coarse" in levels:
            stages.add_module("coarse", nn.AvgPool2d(2))
        return stages


TINY = TinyNetwork(
    name="tiny",
    levels={"fine": Level(5, 2), "coarse": Level(5, 4)},
    default_levels=("fine", "coarse"),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The path of weights for a trunk that is registered for one test."""
    monkeypatch.setitem(TRUNKS, TINY.name, TINY)
    torch.manual_seed(0)
    stages = TINY.build(["fine"])
    nn.init.uniform_(stages.norm.running_var, 0.5, 2)
    nn.init.normal_(stages.norm.running_mean)
    torch.save(stages.state_dict(), tmp_path / "tiny.pth")
    return str(tmp_path / "tiny.pth")


def random_images(seed, count):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(90, 160, (count, 3, 16, 24), np.uint8))


def test_a_new_trunk_fits_scores_and_is_saved(tiny, tmp_path):
    model = PadimModel(
        backbone="tiny", weights=tiny, image_size=(16, 24), device="cpu", sigma=1, **CELLS
    )
    model.update(random_images(0, 9))
    spoiled = random_images(1, 1)
    spoiled[:, :, :6, :6] = 255
    maps = model.score(spoiled).maps
    assert maps[0, :6, :6].mean() > 2 * maps[0, 10:, 10:].mean()
    model.save(str(tmp_path / "model"))
    loaded = PadimModel.load(str(tmp_path / "model"), device="cpu")
    assert torch.equal(loaded.score(spoiled).maps, maps)


def test_a_new_trunks_feature_maps_are_its_modules(tiny):
    model = PadimModel(
        backbone="tiny", weights=tiny, image_size=(16, 24), precision="float32", **CELLS
    )
    stages = TINY.build(TINY.default_levels).eval()
    stages.load_state_dict(torch.load(tiny, weights_only=True))
    mean, std = (torch.tensor(values)[:, None, None] for values in (TINY.mean, TINY.std))
    images = random_images(0, 3)
    with torch.inference_mode():
        fine = stages[:3]((images / 255 - mean) / std)
        expected = [fine, stages.coarse(fine)]
    found = model._detector.embedder.trunk(images.to(model._detector.device))
    for level, features in zip(expected, found, strict=True):
        torch.testing.assert_close(features.cpu(), level, rtol=1e-4, atol=1e-5)


def test_a_new_trunk_has_no_weights_by_name(tiny):
    with pytest.raises(ModelError, match="tiny has no weights named 'IMAGENET1K_V1'"):
        PadimModel(backbone="tiny", image_size=16)
