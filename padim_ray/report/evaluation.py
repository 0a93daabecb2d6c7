"""What the report shows of an evaluation: tables of metrics, and pictures of curves."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from padim_ray.evaluation.tables import LABELS, METRICS, UNDEFINED
from padim_ray.report.gallery import data_uri, relative_link
from padim_ray.storage.location import Location, safe_segment

MOST_GROUPS, MOST_DEFECTS, MOST_CURVES = 60, 150, 8
CURVE_BYTES = 200 * 2**10  # larger pictures are only linked to


@dataclass(frozen=True)
class Line:
    """A row as text: names, numbers of images, and of each metric its value and interval."""

    names: list[str]
    counts: list[str]
    metrics: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """The first `lines` of `count`; `metrics` are their columns' labels."""

    metrics: list[str]
    lines: list[Line]
    count: int


@dataclass(frozen=True)
class Curves:
    """A group's picture of curves, inside the page if it is small."""

    group: str
    src: str | None
    link: str


@dataclass(frozen=True)
class Evaluation:
    """What `metrics.json` holds, groups with the lowest image AUROC first."""

    normal: str
    aupro_limit: float
    average: Line | None
    groups: Table
    defects: Table
    curves: list[Curves]


def summarise_evaluation(metrics: Mapping[str, Any], root: Location) -> Evaluation:
    """Tables and curves for what `metrics.json` holds."""
    groups = sorted(metrics["groups"].items(), key=_auroc)
    defects = [
        (group, defect, of_defect)
        for group, of_group in groups
        for defect, of_defect in of_group["defects"].items()
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
                for group, m in groups[:MOST_GROUPS]
            ],
            len(groups),
        ),
        defects=_table(
            defect_names,
            [
                Line([group, defect], _counts(m, "images"), _cells(m["metrics"], defect_names))
                for group, defect, m in defects[:MOST_DEFECTS]
            ],
            len(defects),
        ),
        curves=list(_curves([group for group, _ in groups[:MOST_CURVES]], root)),
    )


def _present(evaluated: Iterable[Mapping[str, Any]]) -> list[str]:
    """Metrics that were computed at all, in the usual order."""
    present = {name for one in evaluated for name in one["metrics"]}
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
            data = picture.read()
        except FileNotFoundError:
            continue
        link = relative_link(picture.uri, root)
        assert link is not None
        yield Curves(group, data_uri(data, "png") if len(data) <= CURVE_BYTES else None, link)
