import json
from dataclasses import asdict, dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from padim_ray.errors import ModelError
from padim_ray.storage.json_fields import (
    flag,
    mapping,
    number,
    pair,
    parse_json,
    read_fields,
    several,
    text,
    whole,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # a lone surrogate can't be encoded
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
)


@dataclass(frozen=True)
class Camera:
    name: str
    size: tuple[int, int]
    colour: bool
    gain: float = 1.0


CHECKS = {
    "name": text("[a-z]{1,9}"),
    "size": pair(whole(1, 4096)),
    "colour": flag,
    "gain": number,
}
VALID = {"name": "left", "size": [480, 640], "colour": True, "gain": 2.5}


@given(JSON)
def test_json_is_parsed_as_it_was_written(value):
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "it has 'a' twice in one object"),
        (b'[{"a": {"b": 1, "b": 1}}]', "it has 'b' twice in one object"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"[" * 10**6, "it is nested too deeply"),
        (b'{"a": ' * 10**6, "it is nested too deeply"),
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_other_json_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_an_object_becomes_a_dataclass():
    camera = read_fields(Camera, VALID, "rig.json", CHECKS)
    assert camera == Camera("left", (480, 640), True, 2.5)
    assert read_fields(Camera, json.loads(json.dumps(asdict(camera))), "again", CHECKS) == camera


def test_fields_with_defaults_may_be_missing():
    value = {name: VALID[name] for name in ("name", "size", "colour")}
    assert read_fields(Camera, value, "rig.json", CHECKS).gain == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zoom": 2}, "rig.json has the unknown field 'zoom'"),
        ({"name": "LEFT"}, "rig.json.name can't be 'LEFT'"),
        ({"name": "left\n"}, "rig.json.name can't be "),
        ({"name": 7}, "rig.json.name can't be 7"),
        ({"size": [480]}, r"rig.json.size must be a list of two, not \[480\]"),
        ({"size": [480, 640, 3]}, "rig.json.size must be a list of at most 2"),
        ({"size": "48"}, "rig.json.size must be a list of at most 2"),
        ({"size": [480, 4097]}, r"rig.json.size\[1\] must be a whole number from 1 to 4096"),
        ({"size": [True, 640]}, r"rig.json.size\[0\] must be a whole number"),
        ({"size": [480.0, 640]}, r"rig.json.size\[0\] must be a whole number"),
        ({"colour": 1}, "rig.json.colour must be true or false, not 1"),
        ({"gain": False}, "rig.json.gain must be a finite number, not False"),
        ({"gain": float("nan")}, "rig.json.gain must be a finite number, not nan"),
        ({"gain": 10**400}, "rig.json.gain must be a finite number, not 1000"),
        ({"gain": "1"}, "rig.json.gain must be a finite number, not '1'"),
    ],
)
def test_an_error_names_the_wrong_field(changes, message):
    with pytest.raises(ModelError, match=message):
        read_fields(Camera, VALID | changes, "rig.json", CHECKS)


@pytest.mark.parametrize("name", ["name", "size", "colour"])
def test_an_error_names_the_missing_field(name):
    value = {field: content for field, content in VALID.items() if field != name}
    with pytest.raises(ModelError, match=f"'{name}' is missing in rig.json"):
        read_fields(Camera, value, "rig.json", CHECKS)


@given(JSON)
@example("x" * 10**6)
@example([[[["x" * 99] * 9] * 9] * 9] * 9)
@example({"x" * 10**6: 1})
def test_any_other_value_is_refused_in_a_short_sentence(value):
    checks = (whole(5, 4), text("(?!)"), several(whole(5, 4), most=-1), pair(whole(5, 4)))
    for check in checks:
        with pytest.raises(ModelError) as error:
            check(value, "rig.json")
        assert str(error.value).startswith("rig.json") and len(str(error.value)) < 500
    if not isinstance(value, dict):
        with pytest.raises(ModelError, match=r"rig.json must be an object, not "):
            mapping(value, "rig.json")
