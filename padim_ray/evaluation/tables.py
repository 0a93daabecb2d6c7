"""Evaluations: the metrics of every group and defect as JSON, as a table and as Markdown.

Each group has its own model, and scores of different models have different scales. Overall figures
are therefore unweighted means over the groups, as in the result tables on MVTec AD, and not metrics
of all images.
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
All figures lie between 0 and 1. `{UNDEFINED}` means undefined: there are no normal images, no
defective images, no masks or no threshold. Avg is the unweighted mean over the groups in which the
figure is defined, because scores of different models have different scales. A defect's figures
compare its images with all normal images of its group. Intervals hold {LEVEL:.0%} of stratified
bootstrap resamples.

- Image AUROC: the probability that a defective image scores higher than a normal one; ties count
  half.
- Image AUPR: average precision, with defective images as positives.
- Image F1, best: F1 at the best of all thresholds, which takes knowledge of the labels.
- Image F1, false-alarm rate, miss rate: at the model's threshold. An image is flagged if its score
  exceeds it. The rates are the shares of normal images flagged and of defective images not flagged.
- Pixel AUROC; pixel F1, best: the same over all pixels of normal images and of images with a mask.
- Pixel AUPRO: the flagged share of a defective region (8-connected), averaged over all regions and
  over false-positive rates from 0 to {AUPRO_LIMIT}.
"""


@dataclass(frozen=True)
class MaskCounts:
    """How many ground-truth masks of defective images were read.

    `masks`: masks read. `empty_masks`: those of them without a defective pixel. `missing_masks`,
    `unreadable_masks`: masks that were not; the pixels of their images are left out.
    """

    masks: int = 0
    empty_masks: int = 0
    missing_masks: int = 0
    unreadable_masks: int = 0


@dataclass(frozen=True, eq=False)
class GroupOutcome:
    """One group's labelled images, as its model scored them.

    `scores`: (n,) floats. `defects`: the images' labels, (n,), including the normal one.
    `threshold`: the model's image threshold, if it has one. `pixels`: pixel counts per label, of
    images with known ground truth. `masks`: how many masks were read. `failed`: images without a
    score, which count nowhere else.
    """

    scores: np.ndarray
    defects: Sequence[str]
    threshold: float | None = None
    pixels: Mapping[str, PixelCounts] = field(default_factory=dict)
    masks: MaskCounts = MaskCounts()
    failed: int = 0

    def images_of(self, names: Collection[str]) -> np.ndarray:
        """Which images have one of these labels: (n,) bool."""
        return np.array([defect in names for defect in self.defects], bool)

    def pixels_of(self, names: Collection[str]) -> PixelCounts:
        """Pixel counts of all images with one of these labels."""
        counts = (counts for name, counts in self.pixels.items() if name in names)
        return sum(counts, PixelCounts.empty())


def evaluate(outcomes: Mapping[str, GroupOutcome], normal: str, *, seed: int = 0) -> dict:
    """Evaluate all groups. The result is ready for JSON: undefined values are None.

    Args:
        outcomes: by group.
        normal: the label of images without a defect.
        seed: of the bootstrap.

    Returns:
        `average` holds the unweighted mean of each metric over the groups in which it is defined.
        Image metrics of groups and defects have an interval, `low` to `high`. A defect's images are
        compared with all normal images of the group. `images` counts images with a score.
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
        "average": {metric: _mean(figures) for metric, figures in values.items()},
        "groups": groups,
    }


def to_table(evaluation: Mapping) -> pa.Table:
    """One row per group, defect and metric; the defect is null for the whole group."""
    rows = [
        {"group": group, "defect": defect, "metric": metric, "images": part["images"], **figure}
        for group, whole in evaluation["groups"].items()
        for defect, part in {None: whole, **whole["defects"]}.items()
        for metric, figure in part["metrics"].items()
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def to_markdown(evaluation: Mapping) -> str:
    """Markdown tables as in papers: metrics by group, their intervals, and each group's defects."""
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
    """All metrics of the images with these labels."""
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
        f"Masks: {masks['masks']} read ({masks['empty_masks']} empty), "
        f"{masks['missing_masks']} missing, {masks['unreadable_masks']} unreadable."
    )


def _defects_table(group: Mapping) -> str:
    """Rows for all defects and for each one; empty if there are none.

    The false-alarm rate is left out: it is the group's.
    """
    if not group["defects"]:
        return ""
    metrics = [metric for metric in METRICS if metric != "false_alarm_rate"]
    all_defects = {"images": group["defective"], "metrics": group["metrics"]}
    rows = [
        [name, str(part["images"])]
        + [_number(part["metrics"][metric]["value"]) for metric in metrics]
        for name, part in [
            ("**all defects**", all_defects),
            *((_escape(defect), part) for defect, part in group["defects"].items()),
        ]
    ]
    header = ["", "Images", *(LABELS[metric] for metric in metrics)]
    return _table(header, rows)


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
    """A name as plain text on one line, in any Markdown renderer.

    Names come from folders and may hold anything. Only letters, digits, blanks, hyphens and
    underscores within words are kept; all other characters become character references, so that
    none can act as a table's bar, code, a link or a tag.
    """
    return re.sub(
        r"[^\w -]|\b_+|_+\b",
        lambda match: "".join(f"&#{ord(character)};" for character in match[0]),
        " ".join(name.split()),
    )
