"""CURRENT and model.json as an attacker writes them are refused with a ModelError."""

import json
import math
import os

import pytest

from padim_ray import ModelError
from padim_ray.model.layout import current_number
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.helpers.hostile import DESCRIPTION, assert_refused, replaced, save_small_model


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory):
    return save_small_model(weights, tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize(
    "text",
    [
        *(b"-1\n", b"0\n", b"000000", b"1.0", b"1_0", b"0x1", b" 1", b"1\n2\n", b"\n", b"9" * 99),
        *("٣\n".encode(), "²".encode(), b"../000001", b"\0", b"\xff", b"1" * 2**20),
    ],
)
def test_a_pointer_that_names_no_version_is_refused(directory, text):
    assert_refused(directory, "CURRENT", text, "CURRENT")


def test_an_endless_pointer_is_not_read(directory, tmp_path):
    huge = tmp_path / "CURRENT"
    with huge.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ModelError, match=r"CURRENT can't be understood: it has 1099511627776 byt"):
        current_number(Location.of(str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (["format_version"], [True, 1.0, "1", None, [], 10**40]),
        (
            ["manifest"],
            [None, 1, "", "../x", "manifest-1.parquet", "manifest.parquet\n", "CURRENT"],
        ),
        (["spec"], [None, [], "x", 1, {}]),
        (["groups"], [None, [], {"bolt": []}, {"bolt": {}}, {"\ud800": {}}]),
        (["spec", "backbone"], [None, 1, "", "vgg16", "../resnet18", "resnet18\n", "x" * 10**6]),
        (["spec", "precision"], [None, "float64", "__class__", ["float32"]]),
        (
            ["spec", "weights_sha256"],
            [None, "", "../../x", "https://x/y", "a" * 63, "A" * 64, "a" * 64 + "\n", "٣" * 64, 7],
        ),
        (["spec", "weights"], [None, 1, ["x"], "x" * 10**5]),
        (["spec", "sigma"], [None, True, "4", -1, math.nan, math.inf, 1e9, 10**400]),
        (["spec", "stride"], [None, True, "4", 0, -4, 3, 4.0, 64, 10**400]),
        (["spec", "neighbourhood"], [None, True, "1", 0, -1, 2, 33, 1.0, 10**400]),
        (["spec", "score_share"], [None, True, "0", -0.1, 1.1, math.nan, math.inf, 10**400]),
        (["spec", "search"], [None, True, "1", -1, 5, 1.0, 10**400]),
        (["spec", "search_maps"], [None, 1, "true"]),
        (["spec", "channels"], [{}, [], {"layer5": [1]}, {"layer1": 3}, {"layer1": []}]),
        (["spec", "channels", "layer1"], [[-1], [64], [1, 1], [2, 1], [True], [1.0], ["1"], None]),
        (["spec", "channels", "layer1"], [{"0": 1}, [[1]], [10**30], list(range(65))]),
        (["spec", "channels", "layer4"], [[0], []]),
        (
            ["spec", "preprocessing", "resize"],
            [None, [], [32], [32, 32, 32], 32, [32.0, 32], [True, True], ["32", "32"], [0, 0]],
        ),
        (
            ["spec", "preprocessing", "resize"],
            [[-32, -32], [10**9, 10**9], [8192, 32], [33, 33], [64, 64]],
        ),
        (["spec", "preprocessing", "crop"], [[64, 64], [0, 32], [16], False, 0, [10**30, 16]]),
        (["spec", "density", "regularization", "kind"], [None, "PAPER", [], "shrink\n"]),
        (["spec", "density", "regularization", "shrinkage"], [1, -0.1, math.nan, True, "0", None]),
        (["spec", "density", "regularization", "ridge"], [-1, math.inf, 10**400, False, "x"]),
        (["spec", "density"], [None, [], {}, {"kind": "gaussian"}, {"kind": "os"}, "gaussian"]),
        (["spec", "density", "kind"], [None, "Gaussian", "padim_ray.densities.shared", ["shared"]]),
        (["spec", "density", "x"], [1]),
        (["groups", "bolt", "images"], [None, -1, 0, 1, 7, True, 6.0, "6", 10**30]),
        (["groups", "bolt", "failed"], [None, -1, True, 0.0, 10**30]),
        (["groups", "bolt", "shards"], [None, 0, -1, 2, 5, True, 1.0, 10**6, 10**30]),
        (["groups", "bolt", "calibrated"], [None, -1, 5, 7, True, 6.0, 10**30]),
        (["groups", "bolt", "x"], [1]),
        (["groups", "../../etc"], [{"images": 6, "failed": 0, "shards": 1}]),
    ],
)
def test_a_description_with_a_wrong_value_is_refused(directory, path, values):
    for value in values:
        content = json.loads((directory / DESCRIPTION).read_text())
        *parents, name = path
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
        assert_refused(directory, DESCRIPTION, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "Expecting value"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b'{"format_version": %s}' % (b"9" * 5000), "limit"),
        (b'{"format_version": 2, "format_version": 2}', "'format_version' twice"),
        (b'{"format_version": NaN}', "NaN is not JSON"),
        (b'{"format_version": -Infinity}', "Infinity is not JSON"),
        (b'"\xff\xfe"', "codec"),
        (b"null", "must be an object"),
        (b"1", "must be an object"),
        (b" " * (33 * 2**20), "not at most"),
    ],
)
def test_a_description_that_is_no_object_is_refused(directory, data, match):
    assert_refused(directory, DESCRIPTION, data, match)


@pytest.mark.parametrize(
    "group", ["../../etc", "", ".", "..", "a/b", "/etc", "\0", "a\\b", "x" * 999]
)
def test_no_name_of_a_group_leads_out_of_the_model(directory, group):
    content = json.loads((directory / DESCRIPTION).read_text())
    content["groups"] = {group: content["groups"]["bolt"]}
    with replaced(directory / DESCRIPTION, json.dumps(content).encode()):
        version = open_version(Location.of(str(directory)))
        groups = f"{directory}/versions/000001/groups/"
        for load in (version.load_statistics, version.load_density, version.load_calibration):
            with pytest.raises(ModelError, match="is missing") as error:
                load(group)
            (path,) = (word for word in str(error.value).split(": ", 1)[1].split("\n"))
            path = path.removesuffix(" is missing")
            assert os.path.normpath(path) == path and path.startswith(groups)
            assert path.removeprefix(groups).count("/") == 1
