"""Validate the fields of untrusted JSON.

A check takes a value and its position, such as `model.json.sigma`. It returns the value, or raises
a ModelError that names the position.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr
from typing import TYPE_CHECKING, Any, TypeVar

from padim_ray.errors import ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Check = Callable[[Any, str], Any]
T = TypeVar("T", bound="DataclassInstance")
MAX_SHOWN = 400  # characters of a value in an error message
_REPR = Repr()  # cuts each value inside a value, but not the whole
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or Infinity, no endless nesting.

    Raises:
        ValueError: if it is not such JSON. The message says why.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {show(twice)} twice in one object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def show(value: Any) -> str:
    """A value's repr, cut to fit into an error message."""
    shown = _REPR.repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def read_fields(kind: type[T], value: Any, where: str, checks: Mapping[str, Check]) -> T:
    """Build a dataclass from a JSON object.

    Args:
        kind: the dataclass. Fields with a default may be missing in the object.
        value: the parsed object.
        where: its position, for errors.
        checks: one check for every allowed field.

    Raises:
        ModelError: if a field is missing or unknown, or fails its check.
    """
    value = mapping(value, where)
    for name in value:
        if name not in checks:
            raise ModelError(f"{where} has the unknown field {show(name)}")
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is dataclasses.MISSING:
            raise ModelError(f"{field.name!r} is missing in {where}")
    return kind(**{name: checks[name](item, f"{where}.{name}") for name, item in value.items()})


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Check for a JSON object."""
    if not isinstance(value, dict):
        raise ModelError(f"{where} must be an object, not {show(value)}")
    return value


def whole(low: int, high: int) -> Check:
    """Make a check for a whole number from `low` to `high`, both included."""

    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ModelError(
                f"{where} must be a whole number from {low} to {high}, not {show(value)}"
            )
        return value

    return check


def number(value: Any, where: str) -> float:
    """Check for a finite number."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # false for NaN as well
        raise ModelError(f"{where} must be a finite number, not {show(value)}")
    return float(value)


def flag(value: Any, where: str) -> bool:
    """Check for true or false."""
    if type(value) is not bool:
        raise ModelError(f"{where} must be true or false, not {show(value)}")
    return value


def text(pattern: str) -> Check:
    """Make a check for text that matches a regular expression from end to end."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            raise ModelError(f"{where} can't be {show(value)}")
        return value

    return check


def several(item: Check, *, most: int) -> Check:
    """Make a check for a list of at most `most` items, each of which passes `item`."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise ModelError(f"{where} must be a list of at most {most}, not {show(value)}")
        return [item(each, f"{where}[{index}]") for index, each in enumerate(value)]

    return check


def pair(item: Check) -> Check:
    """Make a check for a list of two items, each of which passes `item`. It returns a tuple."""
    items = several(item, most=2)

    def check(value: Any, where: str) -> tuple[Any, Any]:
        if len(both := items(value, where)) != 2:
            raise ModelError(f"{where} must be a list of two, not {show(value)}")
        return both[0], both[1]

    return check
