import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from padim_ray import ModelError, PadimError, PadimModel
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.helpers import dense
from tests.helpers.dense import averaged


def images(seed, count, size=64):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(0).integers(60, 200, (3, size // 8, size // 8)).repeat(8, 1)
    noise = rng.normal(0, 20, (count, 3, size, size))
    return torch.from_numpy((base.repeat(8, 2) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def model(weights):
    model = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    for seed in range(4):
        model.update(images(seed, 6))
    return model


@pytest.mark.parametrize("kind", ["shrink", "paper"])
@pytest.mark.parametrize(
    ("stride", "neighbourhood", "share"), [(4, 1, 0), (16, 1, 0.2), (32, 3, 0.5)]
)
def test_scores_and_maps_equal_the_papers(weights, kind, stride, neighbourhood, share):
    """From pixels to maps, with the dense formulas on the same trunk's averaged features."""
    model = PadimModel(
        weights=weights,
        image_size=(64, 96),
        n_features=40,
        precision="float32",
        regularization=kind,
        stride=stride,
        neighbourhood=neighbourhood,
        score_share=share,
    )
    train, test = images(1, 20, 96)[:, :, :64], images(2, 3, 96)[:, :, :64]
    model.update(train)
    scores, maps = model.score(test)
    features = [
        [
            averaged(level.numpy(), *grid, neighbourhood)
            for level, grid in zip(
                model._detector.embedder.trunk(x), model.spec.grid.grids, strict=True
            )
        ]
        for x in (train, test)
    ]
    squared = dense.squared_distances(*features, kind)
    upsampled = interpolate(
        torch.from_numpy(squared**0.5)[:, None], (64, 96), mode="bilinear", align_corners=False
    )[:, 0]
    expected = gaussian_filter(upsampled.numpy(), 4, mode="mirror", radius=16, axes=(1, 2))
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-4)
    cells = np.sort((squared**0.5).reshape(len(test), -1))
    highest = cells[:, -round(share * cells.shape[1]) :].mean(1) if share else expected.max((1, 2))
    np.testing.assert_allclose(scores.numpy(), highest, rtol=1e-4)


def test_a_fit_goes_on_after_scoring(model, weights):
    other = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    other.update(images(0, 6))
    other.update(images(1, 6))
    early = other.score(images(9, 2)).scores
    other.update(images(2, 6))
    other.update(images(3, 6))
    late = other.score(images(9, 2)).scores
    assert not torch.allclose(early, late, rtol=0.01)
    torch.testing.assert_close(late, model.score(images(9, 2)).scores, rtol=1e-5, atol=0)
    assert other.counts == {"default": 24}


def test_a_saved_model_scores_the_same_and_can_be_updated(model, weights, tmp_path):
    assert model.save(str(tmp_path / "m")) == 1
    loaded = PadimModel.load(str(tmp_path / "m"))
    assert torch.equal(loaded.score(images(9, 2)).maps, model.score(images(9, 2)).maps)
    loaded.update(images(4, 6))
    assert loaded.counts == {"default": 30}
    added = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    for seed in range(5):
        added.update(images(seed, 6))
    torch.testing.assert_close(loaded.score(images(9, 2)).maps, added.score(images(9, 2)).maps)
    assert loaded.save(str(tmp_path / "m")) == 2
    assert open_version(Location.of(str(tmp_path / "m"))).number == 2


def test_a_stored_group_stays_when_another_is_added(model, tmp_path):
    model.save(str(tmp_path / "m"))
    loaded = PadimModel.load(str(tmp_path / "m"))
    loaded.update(images(5, 6), group="new")
    loaded.save(str(tmp_path / "m"))
    again = PadimModel.load(str(tmp_path / "m"))
    assert again.counts == {"default": 24, "new": 6}
    assert torch.equal(again.score(images(9, 2)).maps, model.score(images(9, 2)).maps)


def test_many_small_batches_equal_one_large(model, weights, monkeypatch):
    monkeypatch.setattr("padim_ray.model.padim_model.PARTIAL_IMAGES", 5)
    small = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    for seed in range(4):
        for image in images(seed, 6).split(1):
            small.update(image)
    torch.testing.assert_close(
        small.score(images(9, 2)).maps, model.score(images(9, 2)).maps, rtol=1e-4, atol=0
    )


def test_defects_score_higher(model):
    spoiled = images(9, 4)
    spoiled[:, :, 20:40, 20:40] = 255
    assert model.score(spoiled).scores.min() > model.score(images(9, 4)).scores.max()
    peaks = model.score(spoiled).maps.flatten(1).argmax(1)
    assert ((peaks // 64 - 30).abs() < 14).all()


def test_floats_from_zero_to_one_are_the_same_images(model):
    exact = model.score(images(9, 2)).scores
    torch.testing.assert_close(model.score(images(9, 2) / 255).scores, exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(model.score(images(9, 2).numpy()).scores, exact)


def test_groups_do_not_influence_each_other(model, weights):
    both = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    both.update(images(0, 24), group="a")
    both.update(255 - images(0, 24), group="b")
    negative = 255 - images(9, 1)
    in_its_own, in_the_other = (both.score(negative, group=g).scores for g in "ba")
    assert in_its_own < in_the_other / 2


def test_sigma_zero_does_not_smooth(model):
    maps = model.score(images(9, 1), sigma=0).maps
    assert maps.max() > model.score(images(9, 1)).maps.max()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"must be \(B, 3, 64, 64\)"),
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"but are \(2, 64, 64, 3\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int32), "uint8 or floating-point"),
        (torch.full((2, 3, 64, 64), 2.0), "normalisation itself"),
        (torch.full((2, 3, 64, 64), torch.nan), "0…1"),
        (torch.zeros(0, 3, 64, 64, dtype=torch.uint8), "empty"),
    ],
)
def test_unusable_batches_are_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        model.update(batch)


def test_one_image_cannot_be_finalised(weights):
    model = PadimModel(weights=weights, image_size=64, n_features=10)
    model.update(images(0, 1), group="gear")
    with pytest.raises(ModelError, match="Group 'gear' has 1 image; a fit needs at least 2"):
        model.finalize()


def test_identical_images_are_named_as_the_cause(weights):
    model = PadimModel(
        weights=weights, image_size=64, n_features=10, regularization="paper", epsilon=0
    )
    model.update(images(0, 1).repeat(3, 1, 1, 1), group="gear")
    with pytest.raises(ModelError, match=r"Group 'gear' has a non-positive pivot .* hardly differ"):
        model.finalize()


def test_infinite_features_name_group_and_images(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["bn1.bias"][0] = torch.inf
    torch.save(state, tmp_path / "broken.pth")
    model = PadimModel(weights=str(tmp_path / "broken.pth"), image_size=64)
    with pytest.raises(ModelError, match=r"Group 'gear': images \[0, 1\] .* NaN or infinite"):
        model.update(images(0, 2), group="gear")


def test_an_unknown_group_is_named(model):
    with pytest.raises(ModelError, match="No images of group 'nut'"):
        model.score(images(0, 1), group="nut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 250}, "250×250 is not a multiple of 16.* use 240 or 256"),
        ({"image_size": (256, 8)}, "instead of 8 use 16"),
        ({"image_size": 256, "crop": 225}, "instead of 225 use 224 or 240"),
        ({"image_size": 128, "crop": 256}, "crop 256×256 is larger"),
        ({"layers": "layer5"}, "Unknown layers 'layer5'"),
        ({"backbone": "vgg16"}, "Unknown backbone 'vgg16'"),
        ({"regularization": "none"}, "must be one of shrink, paper"),
    ],
)
def test_options_that_make_no_model_are_refused(weights, options, message):
    with pytest.raises(PadimError, match=message):
        PadimModel(weights=weights, **options)


@pytest.mark.parametrize("layers", ["layer1", "layer2,layer3", "layer1,layer3", "layer1,layer4"])
def test_any_layers_make_a_model(weights, layers):
    model = PadimModel(weights=weights, layers=layers, image_size=64, n_features=20)
    model.update(images(0, 8))
    assert model.score(images(9, 2)).maps.shape == (2, 64, 64)


@pytest.mark.parametrize("kind", ["shrink", "paper"])
@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_leave_one_out_scores_are_those_of_models_refitted_without_the_image(weights, kind, count):
    """With fewer images than channels (40), and with more."""
    options = {"image_size": 64, "n_features": 40, "precision": "float32", "regularization": kind}
    model, train = PadimModel(weights=weights, **options), images(count, count)
    model.update(train)
    scores = torch.cat([model.calibrate(part) for part in train.split(13)])
    for left_out in (0, count // 2, count - 1):
        other = PadimModel(weights=weights, **options)
        other.update(torch.cat([train[:left_out], train[left_out + 1 :]]))
        expected = other.score(train[left_out : left_out + 1]).scores.item()
        tolerance = 1e-4 if kind == "paper" else 0.01
        assert scores[left_out].item() == pytest.approx(expected, rel=tolerance)
    calibration = model.calibration()
    np.testing.assert_array_equal(calibration.scores, np.sort(scores.numpy()))
    assert calibration.pixels.sum() == count * 64 * 64


def test_a_calibration_is_saved_with_the_model_and_emptied_by_an_update(weights, tmp_path):
    model = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    assert model.calibration() is None
    model.update(images(0, 12))
    model.calibrate(images(0, 12))
    model.save(str(tmp_path / "m"))
    loaded = PadimModel.load(str(tmp_path / "m"))
    for name in ("scores", "pixels"):
        stored = getattr(loaded.calibration(), name)
        np.testing.assert_array_equal(stored, getattr(model.calibration(), name))
    loaded.save(str(tmp_path / "again"))
    assert len(PadimModel.load(str(tmp_path / "again")).calibration().scores) == 12
    loaded.update(images(1, 2))
    assert loaded.calibration() is None
    loaded.calibrate(images(1, 2))
    assert len(loaded.calibration().scores) == 2


def test_two_images_are_too_few_to_leave_one_out(weights):
    model = PadimModel(weights=weights, image_size=64, n_features=40, precision="float32")
    model.update(images(0, 2))
    with pytest.raises(ModelError, match="Group 'default' has 2 images; leaving one out takes 3"):
        model.calibrate(images(0, 2))
