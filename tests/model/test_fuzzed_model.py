"""Random bytes and mutations of a model's files are read, or refused with a ModelError.

There are few examples, to keep the suite quick; every run draws new ones.
"""

import copy
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray import ModelError
from tests.helpers.hostile import (
    BOLT,
    DESCRIPTION,
    FAILURES,
    GAUSSIAN,
    JOB,
    LISTED,
    MANIFEST,
    MOMENTS,
    ROUND,
    read_everything,
    replaced,
    save_small_model,
)


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory):
    return save_small_model(weights, tmp_path_factory.mktemp("models") / "model")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 10**400])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=9)
    | st.sampled_from(["../..", "a/b", "resnet18", "layer1", "F32", "U8", "paper"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw, value):
    """JSON with some values replaced, removed or duplicated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(mutated_once(value))
    return value


@st.composite
def mutated_once(draw, value):
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    match draw(st.sampled_from(["deeper"] * 6 + ["remove", "add", "replace"])):
        case "deeper":
            value[key] = draw(mutated_once(value[key]))
        case "remove":
            del value[key]
        case "replace":
            value[key] = draw(JSON)
        case "add" if isinstance(value, dict):
            value[draw(st.text(max_size=5))] = copy.deepcopy(value[key])
        case "add":
            value.append(draw(JSON))
    return value


@st.composite
def damaged(draw, data):
    """Bytes of which some are changed, removed or inserted."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                data[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[where : where + draw(st.integers(1, 20))]
            case "insert":
                data[where:where] = draw(st.binary(max_size=9))
    return bytes(data)


def read_or_refuse(directory, name, data):
    with replaced(directory / name, data):
        try:
            read_everything(directory)
        except ModelError as error:
            assert len(str(error)) < 2000


@pytest.mark.parametrize("name", [DESCRIPTION, JOB, ROUND])
@settings(max_examples=100)
@given(data=st.data())
def test_any_json_is_read_or_refused(directory, name, data):
    content = json.loads((directory / name).read_text())
    read_or_refuse(directory, name, json.dumps(data.draw(mutated(content))).encode())


@pytest.mark.parametrize("name", [DESCRIPTION, JOB, ROUND])
@settings(max_examples=100)
@given(data=st.data())
def test_any_bytes_of_json_are_read_or_refused(directory, name, data):
    content = (directory / name).read_bytes()
    read_or_refuse(directory, name, data.draw(st.binary() | damaged(content)))


@pytest.mark.parametrize("name", [GAUSSIAN, MOMENTS])
@settings(max_examples=40)
@given(data=st.data())
def test_any_header_of_tensors_is_read_or_refused(directory, name, data):
    content = (directory / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(data.draw(mutated(header))).encode()
    content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    read_or_refuse(directory, name, content)


@pytest.mark.parametrize(
    "name",
    [
        *(GAUSSIAN, MOMENTS, f"{BOLT}/calibration.parquet", f"{BOLT}/pixels.parquet"),
        *(MANIFEST, LISTED, FAILURES),
    ],
)
@settings(max_examples=40)
@given(data=st.data())
def test_any_bytes_of_a_file_are_read_or_refused(directory, name, data):
    content = (directory / name).read_bytes()
    read_or_refuse(directory, name, data.draw(st.binary(max_size=200) | damaged(content)))
