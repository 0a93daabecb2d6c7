import json
import os
import re

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import padim_ray
from padim_ray import ModelError, PadimModel
from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.densities.gaussian.moments import Moments
from padim_ray.features.grid import PatchGrid
from padim_ray.features.trunks import choose_channels, find_trunk
from padim_ray.features.weights import weights_sha256
from padim_ray.model.layout import current_number, shard_location
from padim_ray.model.publish import publish, save_tensors
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

GROUPS = ["bolt", "../x", "a/b", ".", "..", "", "漢字", "é", "e\u0301", "%2E", "a b", "x" * 300]


@pytest.fixture(scope="module")
def model(weights):
    """Two groups' worth."""
    model = PadimModel(weights=weights, image_size=64, n_features=20, precision="float32")
    model.update(images(0, 6), group="bolt")
    model.update(images(1, 4), group="nut")
    return model


@pytest.fixture
def saved(model, tmp_path):
    """The model's directory on local disk."""
    model.save(str(tmp_path / "model"))
    return tmp_path / "model"


def read_everything(directory):
    version = open_version(Location.of(str(directory)))
    version.load_trunk_weights()
    version.load_manifest()
    for group in version.groups:
        version.load_statistics(group)
        version.load_density(group)


def files(location):
    """Paths below a location."""
    found = location.fs.find(location.path)
    return sorted(path.removeprefix(location.path + "/") for path in found)


def test_the_layout_is_as_documented(model, place):
    root = place / "models/line7"
    model.save(root.uri, root.options)
    trunk = f"trunks/{model.spec.weights_sha256}.safetensors"
    manifest = open_version(root).manifest
    assert re.fullmatch(r"manifest-[0-9a-f]{16}\.parquet", manifest)
    first = [
        "versions/000001/groups/bolt/gaussian-00000-of-00001.safetensors",
        "versions/000001/groups/bolt/moments-00000-of-00001.safetensors",
        "versions/000001/groups/nut/gaussian-00000-of-00001.safetensors",
        "versions/000001/groups/nut/moments-00000-of-00001.safetensors",
        f"versions/000001/{manifest}",
        "versions/000001/model.json",
    ]
    assert files(root) == [".claims/000002.json", "CURRENT", trunk, *first]
    assert (root / "CURRENT").read() == b"000001\n"
    content = json.loads((root / "versions/000001/model.json").read())
    assert content["format_version"] == 4 and content["manifest"] == manifest
    assert content["groups"] == {
        "bolt": {"images": 6, "failed": 0, "shards": 1, "calibrated": 0},
        "nut": {"images": 4, "failed": 0, "shards": 1, "calibrated": 0},
    }
    assert content["spec"]["weights_sha256"] == model.spec.weights_sha256
    assert content["versions"]["padim-ray"] == padim_ray.__version__
    # the next version is beside the first, on the same trunk
    model.save(root.uri, root.options)
    manifests = manifest, open_version(root).manifest
    second = [name.replace("000001/", "000002/").replace(*manifests) for name in first]
    assert files(root) == [".claims/000004.json", "CURRENT", trunk, *first, *second]
    assert open_version(root).number == current_number(root) == 2


def test_a_saved_model_is_read_back_unchanged(model, place):
    model.save(place.uri, place.options)
    version = open_version(place)
    assert version.spec == model.spec
    assert {name: entry.images for name, entry in version.groups.items()} == model.counts
    for group in model.counts:
        for kept, read in [
            (model._statistics[group].to(torch.float32), version.load_statistics(group)),
            (model._fitted[group], version.load_density(group)),
        ]:
            blocks = "scatters" if isinstance(kept, Moments) else "whitening"
            for a, b in zip(kept.means, read.means, strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype
            for row_a, row_b in zip(getattr(kept, blocks), getattr(read, blocks), strict=True):
                for a, b in zip(row_a, row_b, strict=True):
                    assert torch.allclose(a, b, rtol=2e-7, atol=1e-12) and a.dtype == b.dtype
    loaded = PadimModel.load(place.uri, place.options)
    maps = [either.score(images(9, 2), group="nut").maps for either in (model, loaded)]
    assert torch.equal(*maps)


def test_the_pointer_is_written_last(model, place, monkeypatch):
    model.save(place.uri, place.options)
    written = []
    replaced_by, create = Location.replaced_by, Location.create
    monkeypatch.setattr(
        Location, "replaced_by", lambda self: written.append(self.uri) or replaced_by(self)
    )
    monkeypatch.setattr(
        Location, "create", lambda self, data: written.append(self.uri) or create(self, data)
    )
    model.save(place.uri, place.options)
    assert [uri.rpartition("/")[2] for uri in written[-4:]] == [
        *(open_version(place).manifest, "model.json", "CURRENT"),
        "000004.json",  # the directory is given back
    ]
    # the claim, and two groups' moments and Gaussians; the trunk is there already
    assert len(written) == 9


def test_a_version_is_published_once(model, place):
    model.save(place.uri, place.options)
    version = open_version(place)
    with pytest.raises(ModelError, match="was published by another job meanwhile"):
        publish(place, 1, model.spec, version.groups, version.load_manifest(), "a test")


def test_an_unfinished_fit_keeps_its_number(model, place):
    (place / "versions/000001/job.json").write(b"{}")
    assert model.save(place.uri, place.options) == 2
    assert open_version(place).number == 2


def test_a_full_disk_is_reported_in_a_sentence(place, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(padim_ray.PadimError, match=r"Can't write .*/x: .*No space left on device"):
        save_tensors(place / "x", {"a": torch.zeros(1)})
    assert not (place / "x").exists()


def test_an_unfinished_version_is_not_seen(model, place, monkeypatch):
    model.save(place.uri, place.options)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(pq, "ParquetWriter", fail)
        with pytest.raises(KeyboardInterrupt):
            model.save(place.uri, place.options)
    assert open_version(place).number == 1
    assert model.save(place.uri, place.options) == 2


def test_a_missing_model_is_reported(place):
    assert current_number(place / "none") is None
    with pytest.raises(ModelError, match=r"There is no model at \S+/none$"):
        open_version(place / "none")


def test_another_format_version_is_named(saved):
    edit_json(saved, lambda content: content.update(format_version=5))
    with pytest.raises(ModelError, match=r"model.json has format version 5, .* reads 1 to 4; use"):
        read_everything(saved)


def edit_json(saved, edit):
    path = saved / "versions/000001/model.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


EDITS = [
    (
        lambda content: content.pop("format_version"),
        "it is not a model's: 'format_version' is missing",
    ),
    (lambda content: content.pop("groups"), "can't be understood: .* 'groups' is missing"),
    (lambda content: content.pop("spec"), "can't be understood: .* 'spec' is missing"),
    (lambda content: content.update(groups=[]), "can't be understood"),
    (lambda content: content["groups"]["nut"].pop("shards"), "can't be understood"),
    (lambda content: content["spec"].pop("channels"), "can't be understood"),
    (lambda content: content["spec"].update(depth=3), "can't be understood"),
    (lambda content: content["spec"].update(backbone="vgg16"), "Unknown backbone 'vgg16'"),
    (lambda content: content["spec"].update(precision="int8"), "Unknown precision 'int8'"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_description_that_is_no_models_is_refused(saved, edit, message):
    edit_json(saved, edit)
    with pytest.raises(ModelError, match=message):
        read_everything(saved)


BOLT = "versions/000001/groups/bolt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CURRENT", "CURRENT doesn't name a version|/000000/model.json is missing"),
        ("versions/000001/model.json", "model.json can't be understood"),
        (f"{BOLT}/moments-00000-of-00001.safetensors", "moments-0.*can't be understood"),
        (f"{BOLT}/gaussian-00000-of-00001.safetensors", "gaussian-0.*can't be understood"),
        ("versions/000001/manifest-*", r"manifest-\w+.parquet can't be understood"),
        ("trunks/*.safetensors", r"trunks/\S+ can't be understood"),
    ],
)
@pytest.mark.parametrize("damage", ["half", "empty", "rubbish"])
def test_a_damaged_file_is_named(saved, name, message, damage):
    (path,) = saved.glob(name)
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "rubbish": b"\xff\0?"}[damage])
    with pytest.raises(ModelError, match=message):
        read_everything(saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CURRENT", "There is no model at"),
        ("versions/000001/model.json", "model.json is missing"),
        (f"{BOLT}/moments-00000-of-00001.safetensors", "is incomplete: .*moments-00000"),
        (f"{BOLT}/gaussian-00000-of-00001.safetensors", "is incomplete: .*gaussian-000"),
        ("versions/000001/manifest-*", "is incomplete: .*/manifest-"),
        ("trunks/*.safetensors", "is incomplete: .*/trunks/"),
    ],
)
def test_a_missing_file_is_named(saved, name, message):
    (path,) = saved.glob(name)
    path.unlink()
    with pytest.raises(ModelError, match=message):
        read_everything(saved)


def test_a_pointer_to_nowhere_is_refused(saved):
    (saved / "CURRENT").write_text("000007\n")
    with pytest.raises(ModelError, match=r"versions/000007/model.json is missing"):
        read_everything(saved)


@pytest.mark.parametrize("kind", ["moments", "gaussian"])
def test_another_files_tensors_are_refused(saved, kind):
    path = saved / BOLT / f"{kind}-00000-of-00001.safetensors"
    (trunk,) = saved.glob("trunks/*")
    path.write_bytes(trunk.read_bytes())
    with pytest.raises(ModelError, match=rf"{kind}-00000\S+ can't be understood"):
        read_everything(saved)


def test_other_weights_are_recognised(saved):
    (path,) = saved.glob("trunks/*.safetensors")
    tensors = safetensors.torch.load_file(path)
    tensors["conv1.weight"][0, 0, 0, 0] += 1e-6
    safetensors.torch.save_file(tensors, path)
    assert weights_sha256(tensors) != path.stem
    with pytest.raises(ModelError, match="doesn't hold the weights the model was fitted with"):
        read_everything(saved)


def test_any_name_of_a_group_is_one_directory(weights, place):
    model = PadimModel(weights=weights, image_size=16, n_features=10, precision="float32")
    for seed, group in enumerate(GROUPS):
        model.update(images(seed, 2, 16), group=group)
    root = place / "models/m"
    model.save(root.uri, root.options)
    directories = {
        group: shard_location(root, 1, group, "moments", 0, 1).uri.rsplit("/", 2)[-2]
        for group in GROUPS
    }
    assert len(set(directories.values())) == len(GROUPS)
    assert directories["bolt"] == "bolt" and directories["a b"] == "a b"
    groups = root / "versions/000001/groups"
    assert {name.rpartition("/")[0] for name in files(groups)} == set(directories.values())
    assert {name.split("/")[0] for name in files(place)} == {"models"}  # nothing got out
    assert PadimModel.load(root.uri, root.options).counts == dict.fromkeys(GROUPS, 2)


@pytest.mark.parametrize(
    ("backbone", "n_features", "size"), [("resnet18", 100, 256), ("wide_resnet50_2", 550, 224)]
)
def test_the_state_is_a_quarter_of_the_dense_ones_at_most(backbone, n_features, size):
    channels = choose_channels(backbone, ["layer1", "layer2", "layer3"], n_features, seed=42)
    levels = [find_trunk(backbone).levels[name] for name in channels]
    grid = PatchGrid(
        tuple((size // level.stride, size // level.stride) for level in levels),
        tuple(map(len, channels.values())),
    )
    # the meta device knows shapes and types, and needs no memory
    density = GaussianDensity(Regularization())
    dense = grid.cells[0] * (n_features + n_features**2)
    assert saved_bytes(density.empty(grid, "meta").packed()) * 4 <= 8 * dense
    assert saved_bytes(density.empty_fitted(grid, "meta").packed()) * 4 <= 4 * dense


def saved_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


def test_files_hold_the_state_and_little_else(model, saved):
    for kind, tensors in [
        ("moments", model._statistics["bolt"].packed()),
        ("gaussian", model._fitted["bolt"].packed()),
    ]:
        size = os.path.getsize(saved / BOLT / f"{kind}-00000-of-00001.safetensors")
        assert 0 < size - saved_bytes(tensors) < 2000
