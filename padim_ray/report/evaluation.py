"""The report's section on an evaluation: tables of metrics, and pictures of curves."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padim_ray.evaluation.tables import LABELS, METRICS, UNDEFINED
from padim_ray.report.gallery import data_uri, relative_link
from padim_ray.storage.location import Location, safe_segment
from padim_ray.storage.untrusted import parse_file

MAX_GROUPS, MAX_DEFECTS, MAX_CURVES = 60, 150, 8
CURVE_BYTES = 200 * 2**10  # larger pictures are only linked
MAX_CURVE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Line:
    """A row as text: names, numbers of images, and each metric's value and interval."""

    names: list[str]
    counts: list[str]
    metrics: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """The first lines of a table that has `count`; `metrics` are the labels of its columns."""

    metrics: list[str]
    lines: list[Line]
    count: int


@dataclass(frozen=True)
class Curves:
    """A group's picture of curves: a link and, if the picture is small, a data URI in `src`."""

    group: str
    src: str | None
    link: str


@dataclass(frozen=True)
class Evaluation:
    """The content of `metrics.json`, groups with the lowest image AUROC first."""

    normal: str
    aupro_limit: float
    average: Line | None
    groups: Table
    defects: Table
    curves: list[Curves]


def summarise_evaluation(metrics: Mapping[str, Any], root: Location) -> Evaluation:
    """Tables and curves of an evaluation.

    Args:
        metrics: the content of `metrics.json`.
        root: the run's directory, which has the pictures in `curves/`.
    """
    groups = sorted(metrics["groups"].items(), key=_auroc)
    defects = [
        (group, defect, evaluated)
        for group, group_evaluated in groups
        for defect, evaluated in group_evaluated["defects"].items()
    ]
    names = _present(evaluated for _, evaluated in groups)
    defect_names = _present(evaluated for _, _, evaluated in defects)
    average = {name: {"value": value} for name, value in metrics["average"].items()}
    return Evaluation(
        normal=metrics["normal"],
        aupro_limit=metrics["aupro_limit"],
        average=Line([], [], _cells(average, names)) if len(groups) > 1 else None,
        groups=_table(
            names,
            [
                Line([group], _counts(m, "images", "defective"), _cells(m["metrics"], names))
                for group, m in groups[:MAX_GROUPS]
            ],
            len(groups),
        ),
        defects=_table(
            defect_names,
            [
                Line([group, defect], _counts(m, "images"), _cells(m["metrics"], defect_names))
                for group, defect, m in defects[:MAX_DEFECTS]
            ],
            len(defects),
        ),
        curves=list(_curves([group for group, _ in groups[:MAX_CURVES]], root)),
    )


def _present(evaluated: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics that any group or defect has, in the order of `METRICS`."""
    present = {name for part in evaluated for name in part["metrics"]}
    return [name for name in METRICS if name in present]


def _table(names: list[str], lines: list[Line], count: int) -> Table:
    return Table([LABELS[name] for name in names], lines, count)


def _counts(evaluated: Mapping[str, Any], *names: str) -> list[str]:
    return [f"{evaluated[name]:,}" for name in names]


def _auroc(item: tuple[str, Mapping[str, Any]]) -> tuple[float, str]:
    group, evaluated = item
    value = evaluated["metrics"].get("image_auroc", {}).get("value")
    return (2 if value is None else value), group


def _cells(metrics: Mapping[str, Any], names: list[str]) -> list[tuple[str, str]]:
    return [_cell(metrics.get(name, {})) for name in names]


def _cell(metric: Mapping[str, float | None]) -> tuple[str, str]:
    value, low, high = (metric.get(name) for name in ("value", "low", "high"))
    interval = "" if low is None or high is None else f"{low:.3f}–{high:.3f}"
    return (UNDEFINED, "") if value is None else (f"{value:.3f}", interval)


def _curves(groups: list[str], root: Location) -> Iterator[Curves]:
    for group in groups:
        picture = root / f"curves/{safe_segment(group)}.png"
        try:
            data = parse_file(root, picture, MAX_CURVE_BYTES, Path.read_bytes)
        except FileNotFoundError:
            continue
        link = relative_link(picture.uri, root)
        assert link is not None
        yield Curves(group, data_uri(data, "png") if len(data) <= CURVE_BYTES else None, link)
