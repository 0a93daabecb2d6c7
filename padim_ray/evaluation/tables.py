"""Evaluations: the metrics of every group and defect, as JSON, as tables and in Markdown.

A model belongs to a group, and different models' scores have different scales. Overall figures are
therefore not computed from all images together but are the unweighted mean over the groups, as in
the result tables on MVTec AD.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan

import numpy as np
import pyarrow as pa

from padim_ray.evaluation.metrics import (
    AUPRO_LIMIT,
    IMAGE_METRICS,
    LEVEL,
    PIXEL_METRICS,
    PixelCounts,
    bootstrap,
    image_metrics,
    pixel_metrics,
)

METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
LABELS = {
    "image_auroc": "Image AUROC",
    "image_aupr": "Image AUPR",
    "image_f1_best": "Image F1, best",
    "image_f1": "Image F1",
    "false_alarm_rate": "False-alarm rate",
    "miss_rate": "Miss rate",
    "pixel_auroc": "Pixel AUROC",
    "pixel_aupro": "Pixel AUPRO",
    "pixel_f1_best": "Pixel F1, best",
}
UNDEFINED = "–"
_SCHEMA = pa.schema(
    {
        "group": pa.string(),
        "defect": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "images": pa.int64(),
    }
)
_MEANING = f"""\
All figures are shares between 0 and 1; `{UNDEFINED}` is undefined, for want of normal or of
defective images, of masks or of a threshold. Avg is the unweighted mean over the groups that define
the figure: different models' scores have different scales. A defect's figures tell its images from
all normal images of its group. Intervals hold {LEVEL:.0%} of stratified bootstrap resamples.

- Image AUROC: how often a defective image scores higher than a normal one, ties counting half.
- Image AUPR: average precision, defective images being the positives.
- Image F1, best: at the best of all thresholds, chosen with knowledge of the labels.
- Image F1, false-alarm rate, miss rate: an image is flagged if its score exceeds the model's
  threshold; shares of normal images flagged, of defective images not flagged.
- Pixel AUROC, pixel F1, best: the same of all pixels of normal images and of images with a mask.
- Pixel AUPRO: the share of each defective region (8-connected) that is flagged, on average over
  regions and over false-positive rates from 0 to {AUPRO_LIMIT}.
"""


@dataclass(frozen=True)
class MaskCounts:
    """Ground-truth masks of the defective images.

    `masks` were read, `empty_masks` of them without a defective pixel. `missing_masks` and
    `unreadable_masks` are of images whose pixels don't count.
    """

    masks: int = 0
    empty_masks: int = 0
    missing_masks: int = 0
    unreadable_masks: int = 0


@dataclass(frozen=True, eq=False)
class GroupOutcome:
    """What one group's model made of labelled images.

    `scores`: (n,) floats. `defects`: (n,) names, the normal one among them. `threshold`: the
    model's, of image scores, if it has one. `pixels`: counts per name, of images whose pixels'
    truth is known. `masks`: what was found of masks. `failed`: images without a score, which count
    nowhere else.
    """

    scores: np.ndarray
    defects: Sequence[str]
    threshold: float | None = None
    pixels: Mapping[str, PixelCounts] = field(default_factory=dict)
    masks: MaskCounts = MaskCounts()
    failed: int = 0

    def images_of(self, names: Collection[str]) -> np.ndarray:
        """Which images have one of these names: (n,) bool."""
        return np.array([defect in names for defect in self.defects], bool)

    def pixels_of(self, names: Collection[str]) -> PixelCounts:
        """The pixels of all images with one of these names."""
        counts = (counts for name, counts in self.pixels.items() if name in names)
        return sum(counts, PixelCounts.empty())


def evaluate(outcomes: Mapping[str, GroupOutcome], normal: str, *, seed: int = 0) -> dict:
    """The evaluation of all groups, ready for JSON: what is undefined is None.

    Args:
        outcomes: by group.
        normal: the name that images without a defect have.
        seed: of the bootstrap.

    Returns:
        `average` holds each metric's unweighted mean over the groups that define it. Image metrics
        of groups and of their defects have an interval, `low` to `high`; a defect's images are
        compared with all normal images of the group. `images` are those with a score.
    """
    groups = {
        group: _evaluate_group(outcome, normal, seed) for group, outcome in sorted(outcomes.items())
    }
    values = {
        metric: [group["metrics"][metric]["value"] for group in groups.values()]
        for metric in METRICS
    }
    return {
        "normal": normal,
        "aupro_limit": AUPRO_LIMIT,
        "average": {metric: _mean(defined) for metric, defined in values.items()},
        "groups": groups,
    }


def to_table(evaluation: Mapping) -> pa.Table:
    """One row per group, defect (null: the whole group) and metric."""
    rows = [
        {"group": group, "defect": defect, "metric": metric, "images": part["images"], **figure}
        for group, whole in evaluation["groups"].items()
        for defect, part in {None: whole, **whole["defects"]}.items()
        for metric, figure in part["metrics"].items()
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def to_markdown(evaluation: Mapping) -> str:
    """Tables as papers print them: metrics by group, their intervals, and each group's defects."""
    groups = evaluation["groups"]
    names = [_escape(group) for group in groups]
    averages = evaluation["average"]
    figures = [
        [LABELS[metric], _number(averages[metric])]
        + [_number(group["metrics"][metric]["value"]) for group in groups.values()]
        for metric in METRICS
    ]
    intervals = [
        [LABELS[metric], *(_interval(group["metrics"][metric]) for group in groups.values())]
        for metric in IMAGE_METRICS
    ]
    sections = [
        "# Evaluation",
        _table(["", "Avg", *names], figures),
        f"## {LEVEL:.0%} intervals",
        _table(["", *names], intervals),
    ]
    for name, group in zip(names, groups.values(), strict=True):
        sections += [f"## {name}", _describe(group), _defects_table(group)]
    return "\n\n".join([*filter(None, sections), "## What the figures mean", _MEANING])


def _evaluate_group(outcome: GroupOutcome, normal: str, seed: int) -> dict:
    names = {*outcome.defects, *outcome.pixels}
    normals = int(outcome.images_of([normal]).sum())
    return {
        "images": len(outcome.defects),
        "normal": normals,
        "defective": len(outcome.defects) - normals,
        "failed": outcome.failed,
        "threshold": outcome.threshold,
        "pixels": asdict(outcome.masks),
        "metrics": _measure(outcome, normal, names, seed),
        "defects": {
            defect: {
                "images": int(outcome.images_of([defect]).sum()),
                "metrics": _measure(outcome, normal, [normal, defect], seed),
            }
            for defect in sorted(names - {normal})
        },
    }


def _measure(
    outcome: GroupOutcome, normal: str, names: Collection[str], seed: int
) -> dict[str, dict[str, float | None]]:
    """All metrics of the images with these names."""
    chosen = outcome.images_of(names)
    is_defective = ~outcome.images_of([normal])
    images = np.asarray(outcome.scores)[chosen], is_defective[chosen], outcome.threshold
    values = image_metrics(*images)
    intervals = bootstrap(*images, seed=seed)
    figures = {
        metric: {"value": values[metric], "low": low, "high": high}
        for metric, (low, high) in intervals.items()
    }
    figures |= {
        metric: {"value": value}
        for metric, value in pixel_metrics(outcome.pixels_of(names)).items()
    }
    return {
        metric: {key: None if isnan(value) else value for key, value in figure.items()}
        for metric, figure in figures.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _describe(group: Mapping) -> str:
    masks = group["pixels"]
    threshold = group["threshold"]
    return (
        f"{group['images']} images: {group['normal']} normal, {group['defective']} defective; "
        f"{group['failed']} more failed. "
        f"Threshold: {'none' if threshold is None else f'{threshold:.4g}'}. "
        f"Masks: {masks['masks']} used, {masks['empty_masks']} empty, "
        f"{masks['missing_masks']} missing, {masks['unreadable_masks']} unreadable."
    )


def _defects_table(group: Mapping) -> str:
    """All defects together, then each; the false-alarm rate is the group's, and stands above."""
    metrics = [metric for metric in METRICS if metric != "false_alarm_rate"]
    together = {"images": group["defective"], "metrics": group["metrics"]}
    rows = [
        [name, str(part["images"])]
        + [_number(part["metrics"][metric]["value"]) for metric in metrics]
        for name, part in [
            ("**all defects**", together),
            *((_escape(defect), part) for defect, part in group["defects"].items()),
        ]
    ]
    header = ["", "Images", *(LABELS[metric] for metric in metrics)]
    return _table(header, rows) if group["defects"] else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        for first, *others in [header, rule, *rows]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def _interval(figure: Mapping) -> str:
    if figure["low"] is None:
        return UNDEFINED
    return f"{_number(figure['low'])}–{_number(figure['high'])}"


def _escape(name: str) -> str:
    """A name as text on one line, whatever the renderer: names come from folders, so from anyone.

    Character references take the place of all but letters, digits, blanks, hyphens, and underscores
    within words: none can be a table's bar, code, a link or a tag.
    """
    return re.sub(
        r"[^\w -]|\b_+|_+\b",
        lambda match: "".join(f"&#{ord(character)};" for character in match[0]),
        " ".join(name.split()),
    )
