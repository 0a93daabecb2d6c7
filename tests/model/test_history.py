"""Inspect a model, roll it back and prune it, on local disk and on S3."""

import json

import numpy as np
import pytest

from padim_ray import ModelError, PadimError, PadimModel, cli
from padim_ray.model.history import inspect, prune, roll_back
from padim_ray.model.layout import current_number, next_number, published_numbers, split_name
from padim_ray.model.rounds import Round
from padim_ray.model.version import open_named, open_version
from padim_ray.runs.job_record import JOB
from padim_ray.storage.claim import claimed
from tests.model.test_padim_model import images

NAMES = ["bolt", "a/b [red]x[/red]\x1b[2J"]


@pytest.fixture(scope="module")
def model(weights):
    """Two groups, of which one is calibrated."""
    model = PadimModel(weights=weights, image_size=64, n_features=20, precision="float32")
    for seed, name in enumerate(NAMES):
        model.update(images(seed, 8), group=name)
    model.calibrate(images(0, 8), group=NAMES[0])
    return model


@pytest.fixture
def root(model, place):
    """A model of four versions."""
    root = place / "models/line7"
    for _ in range(4):
        model.save(root.uri, root.options)
    return root


def test_inspecting_describes_all_versions_and_one_in_detail(root, model):
    info = inspect(root)
    assert (info.current, info.number) == (4, 4)
    assert [version.number for version in info.versions] == [1, 2, 3, 4]
    assert {(each.groups, each.images) for each in info.versions} == {(2, 16)}
    assert all("16 images" in version.why and version.created_at for version in info.versions)
    sizes = root.file_sizes()
    assert sizes.pop(".claims/000008.json")
    pointer, files = sizes.pop("CURRENT"), sum(version.bytes for version in info.versions)
    assert files + info.trunk_bytes == sum(sizes.values()) and pointer
    assert info.bytes == sum(sizes.values()) + pointer
    for kind, name in (("statistics_bytes", "moments-"), ("density_bytes", "gaussian-")):
        of_kind = {file: size for file, size in sizes.items() if f"/{name}" in file}
        of_versions = [getattr(version, kind) for version in info.versions]
        assert len(set(of_versions)) == 1 and sum(of_versions) == sum(of_kind.values()) > 0
        of_group = [size for file, size in of_kind.items() if "000004/groups/bolt/" in file]
        assert getattr(info.groups["bolt"], kind) == sum(of_group) > 0
    calibrated, other = (info.groups[name] for name in NAMES)
    scores = model.calibration(NAMES[0]).scores
    assert calibrated.calibrated == 8 and calibrated.bytes > other.bytes > 0
    assert calibrated.median == pytest.approx(np.median(scores))
    assert calibrated.threshold == scores.max()  # 8 images don't reach 0.01
    assert (other.calibrated, other.median, other.threshold) == (0, None, None)
    assert info.settings["channels"] == {k: len(v) for k, v in model.spec.channels.items()}


def test_the_info_command_prints_the_description(root, capsys):
    options = ["--storage-options", json.dumps(root.options)] if root.options else []

    def printed(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["info", root.uri, *arguments, *options])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    table = printed()
    assert "bolt" in table and "saved from Python with 16 images" in table
    assert f"{sum(root.file_sizes().values()) / 1e6:.3g} MB in all" in table
    assert "[red]x" in table and "\x1b" not in table  # no markup, no control characters
    for number in (4, 2):
        expected = json.loads(json.dumps(inspect(root, number).to_json()))
        assert json.loads(printed("--version", str(number), "--json")) == expected
    assert json.loads(printed("--json"))["number"] == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://models/line7", ("s3://models/line7", None)),
        ("s3://models/line7@3", ("s3://models/line7", 3)),
        ("models/a@2@000010", ("models/a@2", 10)),
        ("models/line7@3/", ("models/line7@3/", None)),
        ("models/line@new", ("models/line@new", None)),
        ("@3", ("@3", None)),
    ],
)
def test_a_name_may_end_with_a_version(name, expected):
    assert split_name(name) == expected


def test_a_model_is_loaded_as_it_is_named(root, model):
    roll_back(root, 2)
    for name, number in ((root.uri, 2), (f"{root.uri}@3", 3)):
        assert open_named(name, root.options).number == number
        assert PadimModel.load(name, root.options).counts == model.counts
    with pytest.raises(ModelError, match="has no version 9; it has 1, 2, 3, 4"):
        PadimModel.load(f"{root.uri}@9", root.options)


def test_an_earlier_version_becomes_current_again(root, model):
    roll_back(root, 2)
    assert current_number(root) == open_version(root).number == 2
    assert published_numbers(root) == [1, 2, 3, 4]
    assert inspect(root).current == 2 and inspect(root, 4).number == 4
    assert next_number(root) == model.save(root.uri, root.options) == 5  # nobody's number again
    assert current_number(root) == 5


def test_a_fit_that_was_killed_before_its_end_doesnt_undo_a_rollback(root):
    Round(1, 16).commit(root / "versions/000004", {})
    roll_back(root, 3)
    assert Round.latest(root / "versions/000004", root).number == 0


@pytest.mark.parametrize("number", [0, 5, -1])
def test_a_version_that_isnt_there_is_refused(root, number):
    for refused in (roll_back, inspect):
        with pytest.raises(ModelError, match=r"no version .* it has 1, 2, 3, 4"):
            refused(root, number)
    assert current_number(root) == 4


def test_old_versions_are_deleted(root):
    roll_back(root, 1)
    (root / "versions/000005" / JOB).write(b"{}")  # an unfinished fit
    (root / f"trunks/{64 * 'a'}.safetensors").write(b"of no version")
    before = inspect(root)
    assert prune(root, keep=2) == [2]
    assert published_numbers(root) == [1, 3, 4] and current_number(root) == 1
    assert (root / "versions/000005" / JOB).exists()
    names = root.file_sizes()
    assert not any(name.startswith("versions/000002") for name in names)
    trunks = [name for name in names if name.startswith("trunks/")]
    assert trunks == [f"trunks/{before.settings['weights_sha256']}.safetensors"]
    for number in (1, 3, 4):
        version = open_version(root, number)
        version.load_trunk_weights()
        assert {group: version.load_density(group) for group in version.groups}
    assert prune(root, keep=1) == [3]


def test_an_abandoned_fit_is_deleted(root, model):
    (root / "versions/000005" / JOB).write(b"{}")
    assert model.save(root.uri, root.options) == 6
    assert prune(root, keep=9) == []
    assert not (root / "versions/000005" / JOB).exists()


@pytest.mark.parametrize("change", [lambda root: roll_back(root, 1), lambda root: prune(root, 1)])
def test_only_one_at_a_time_changes_a_model(root, change):
    with claimed(root, "fit"), pytest.raises(PadimError, match="written by another fit job"):
        change(root)
    assert published_numbers(root) == [1, 2, 3, 4] and current_number(root) == 4


def test_a_directory_without_a_model_is_refused(place):
    for refused in (lambda: inspect(place / "x"), lambda: roll_back(place / "x", 1)):
        with pytest.raises(ModelError, match="no model"):
            refused()
    with pytest.raises(ModelError, match="no model"):
        prune(place / "x", 1)
    with pytest.raises(PadimError, match="--keep must be at least 1"):
        prune(place / "x", 0)
