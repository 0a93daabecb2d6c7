"""Comparison of our metrics with published ones: the tables, and their Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

METRICS = {
    "image_auroc": "Image AUROC",
    "pixel_auroc": "Pixel AUROC",
    "image_f1_best": "Image F1 at the best threshold",
    "pixel_aupro": "Pixel AUPRO up to a false positive rate of 0.3",
}
PUBLISHED = Path(__file__).with_name("published.yaml")
SUBSET_NOTE = "* over the categories that this run covers, for both ours and the published figures"


@dataclass(frozen=True)
class Result:
    """A published result on MVTec AD: averages by metric, values by metric and category."""

    name: str
    settings: str
    averages: Mapping[str, float]
    categories: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Published:
    """The published results, their sources, and the names of MVTec AD's categories."""

    categories: tuple[str, ...]
    results: tuple[Result, ...]
    sources: Mapping[str, str]

    def legend(self, settings: str) -> dict[str, str]:
        """Settings by column and description by source; `settings` are ours."""
        columns = {result.name: result.settings for result in self.results}
        return {"ours": settings} | columns | dict(self.sources)


@dataclass(frozen=True)
class Table:
    """Rows of a name and a value per column, which is None if unknown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    note: str = ""


def read_published() -> Published:
    """Read the published figures."""
    content = yaml.safe_load(PUBLISHED.read_text())
    results = []
    for entry in content["results"]:
        metrics = entry["metrics"].items()
        results.append(
            Result(
                name=f"{entry['source']} {entry['model']}",
                settings=describe(**entry["settings"]),
                averages={metric: figures["average"] for metric, figures in metrics},
                categories={metric: figures.get("categories", {}) for metric, figures in metrics},
            )
        )
    sources = {
        name: f"{source['title']}. {source['note']} {source['url']}"
        for name, source in content["sources"].items()
    }
    return Published(tuple(content["categories"]), tuple(results), sources)


def describe(
    backbone: str,
    n_features: int,
    image_size: Sequence[int],
    crop: Sequence[int] | None,
    regularization: str,
) -> str:
    """Describe settings in one line, named as the options of `padim-ray fit`."""
    cropped = f"crop {crop[0]}×{crop[1]}" if crop else "no crop"
    size = f"{image_size[0]}×{image_size[1]}"
    return f"{backbone}, {n_features} features, {size}, {cropped}, regularization {regularization}"


def compare(metrics: Mapping[str, Any], published: Published) -> list[Table]:
    """Compare our metrics with the published ones.

    Args:
        metrics: the content of an evaluation's `metrics.json`.

    Returns:
        A table for each metric that we have for any category, with our column before the published
        ones and rows of averages and categories; and a table of groups that are not in MVTec AD.
    """
    groups = metrics["groups"]
    ours = {
        metric: {group: _value(content, metric) for group, content in groups.items()}
        for metric in METRICS
    }
    known = [category for category in published.categories if category in groups]
    others = sorted(set(groups) - set(known))
    tables = [
        _compare_metric(metric, {category: ours[metric][category] for category in known}, published)
        for metric in METRICS
        if any(ours[metric][category] is not None for category in known)
    ]
    if others:
        rows = tuple((group, tuple(ours[metric][group] for metric in METRICS)) for group in others)
        tables.append(Table("Groups that are not in MVTec AD", tuple(METRICS), rows))
    return tables


def _value(group: Mapping[str, Any], metric: str) -> float | None:
    return group["metrics"].get(metric, {}).get("value")


def _compare_metric(metric: str, ours: Mapping[str, float | None], published: Published) -> Table:
    results = [result for result in published.results if metric in result.averages]
    common = [category for category, value in ours.items() if value is not None]
    theirs = [result.categories[metric] for result in results]
    average = fmean(ours[category] for category in common)
    is_complete = len(common) == len(published.categories)
    rows = [
        (
            f"average of {len(published.categories)}",
            (average if is_complete else None, *(result.averages[metric] for result in results)),
        )
    ]
    if not is_complete:
        averages = (
            fmean(values[category] for category in common) if values else None for values in theirs
        )
        rows.append((f"average of {len(common)}*", (average, *averages)))
    rows += [
        (category, (value, *(values.get(category) for values in theirs)))
        for category, value in ours.items()
    ]
    columns = ("ours", *(result.name for result in results))
    return Table(METRICS[metric], columns, tuple(rows), "" if is_complete else SUBSET_NOTE)


def format_value(value: float | None) -> str:
    """Format a value with three decimals, as published."""
    return "–" if value is None else f"{value:.3f}"


def to_markdown(tables: Iterable[Table], settings: str, published: Published) -> str:
    """Render the comparison as a Markdown document."""
    legend = published.legend(settings).items()
    blocks = [
        "# padim-ray compared with published PaDiM",
        "\n".join(f"- **{name}**: {_escaped(text)}" for name, text in legend),
    ]
    for table in tables:
        blocks.append(f"## {table.title}")
        lines = [("", *table.columns), (":--", *["--:"] * len(table.columns))]
        lines += [(_escaped(name), *map(format_value, values)) for name, values in table.rows]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if table.note:
            blocks.append(_escaped(table.note))
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"[\\|`*<\[\]]", r"\\\g<0>", text)
