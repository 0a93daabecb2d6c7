"""Read run.json and metrics.json safely: anybody may have written a run's directory."""

from datetime import datetime
from itertools import pairwise
from typing import Any

from padim_ray.errors import ModelError
from padim_ray.storage.json_fields import (
    Check,
    flag,
    mapping,
    number,
    pair,
    parse_json,
    several,
    text,
    whole,
)
from padim_ray.storage.location import Location
from padim_ray.storage.untrusted import parse_file

MAX_BYTES = 2**30  # of the summaries of 300,000 groups
MAX_BINS = 10_000


def read_run(root: Location) -> dict[str, Any] | None:
    """The content of run.json; None if there is none.

    Raises:
        ModelError: if it isn't what a run writes.
    """
    return _read(
        root,
        "run.json",
        # before format 4 of the model there was no range
        lambda value, where: _RUN({"grey_range": None, **mapping(value, where)}, where),
    )


def read_metrics(root: Location) -> dict[str, Any] | None:
    """The content of metrics.json; None if there is none.

    Raises:
        ModelError: if it isn't what an evaluation writes.
    """
    return _read(root, "metrics.json", _METRICS)


def _read(root: Location, name: str, check: Check) -> Any:
    try:
        return parse_file(
            *(root, root / name, MAX_BYTES),
            lambda path: check(parse_json(path.read_bytes()), "it"),
        )
    except FileNotFoundError:
        return None


def _object(**fields: Check) -> Check:
    """A check for an object with these fields, and any others."""

    def check(value: Any, where: str) -> dict[str, Any]:
        content = mapping(value, where)
        for name, test in fields.items():
            if name not in content:
                raise ModelError(f"{name!r} is missing in {where}")
            content[name] = test(content[name], f"{where}.{name}")
        return content

    return check


def _by_name(item: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        content = mapping(value, where)
        return {name: item(each, f"{where}.{name}") for name, each in content.items()}

    return check


def _optional(item: Check) -> Check:
    return lambda value, where: None if value is None else item(value, where)


def _moment(value: Any, where: str) -> str:
    try:
        datetime.fromisoformat(_text(value, where))
    except ValueError as error:
        raise ModelError(f"{where} is no time: {error}") from error
    return value


def _histogram(value: Any, where: str) -> dict[str, Any]:
    content = _object(edges=_numbers, scores=_numbers, leave_one_out=_numbers)(value, where)
    edges, scores, others = (content[name] for name in ("edges", "scores", "leave_one_out"))
    if not len(edges) - 1 == len(scores) == len(others):
        raise ModelError(f"{where} must have one edge more than counts")
    if not all(0 < low < high for low, high in pairwise(edges)):
        raise ModelError(f"{where}.edges must ascend from above 0")
    if min([*scores, *others], default=0) < 0:
        raise ModelError(f"{where} has negative counts")
    return content


_text = text(".*")
_count = whole(0, 10**12)
_numbers = several(number, most=MAX_BINS)
_drift = _object(distance=number, critical=number, higher=flag, has_changed=flag, meaning=_text)
_group = _object(
    listed=_count,
    scored=_count,
    failed=_count,
    flagged=_count,
    threshold=_optional(number),
    threshold_note=_optional(_text),
    pixel_threshold=_optional(number),
    calibration_images=_count,
    drift=_optional(_drift),
    histogram=_optional(_histogram),
    heatmap_scale=_optional(pair(number)),
)
_RUN = _object(
    job=_text,
    padim_ray=_text,
    started_at=_moment,
    finished_at=_moment,
    images=_text,
    model=_text,
    model_version=_count,
    alpha=number,
    threshold=_optional(number),
    heatmaps=_text,
    grey_range=_optional(pair(number)),
    listed=_count,
    scored=_count,
    failed=_count,
    flagged=_count,
    failed_by_cause=_by_name(_count),
    seconds=number,
    images_per_second=number,
    groups=_by_name(_group),
)
_metrics = _by_name(_by_name(_optional(number)))
_METRICS = _object(
    normal=_text,
    aupro_limit=number,
    average=_by_name(_optional(number)),
    groups=_by_name(
        _object(
            images=_count,
            defective=_count,
            metrics=_metrics,
            defects=_by_name(_object(images=_count, metrics=_metrics)),
        )
    ),
)
