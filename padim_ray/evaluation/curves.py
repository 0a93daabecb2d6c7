"""Curves behind the metrics: ROC, precision-recall and per-region overlap (PRO)."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from padim_ray.evaluation.metrics import (
    AUPRO_LIMIT,
    aupro,
    auroc,
    average_precision,
    count_flagged,
    count_scores,
)
from padim_ray.evaluation.tables import GroupOutcome
from padim_ray.scoring.threshold import is_flagged

# colours of Okabe and Ito, distinguishable with colour blindness
_IMAGE: dict[str, Any] = {"color": "#0072B2", "linestyle": "-"}
_PIXEL: dict[str, Any] = {"color": "#D55E00", "linestyle": "--"}
_THRESHOLD: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 7, "linestyle": "none"}
MAX_TITLE = 100  # characters


def draw_curves(group: str, outcome: GroupOutcome, normal: str) -> bytes:
    """Draw a group's curves as a PNG of 1200 × 480 pixels: ROC, precision-recall and PRO.

    Curves whose area is undefined are left out. A diamond marks the model's threshold.

    Args:
        group: the title.
        outcome: the group's scores, labels and pixel counts.
        normal: the label of images without a defect.
    """
    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    figure.suptitle(" ".join(group.split())[:MAX_TITLE], parse_math=False)
    roc, precision_recall, overlap = figure.subplots(1, 3)
    _panel(roc, "ROC", "False-positive rate", "True-positive rate")
    _panel(precision_recall, "Precision-recall", "Recall", "Precision")
    _panel(overlap, "Per-region overlap (PRO)", "False-positive rate of pixels", "Mean overlap")

    scores, normals, defectives = count_scores(outcome.scores, ~outcome.images_of([normal]))
    pixels = outcome.pixels_of(outcome.pixels)
    for name, negatives, positives, style in (
        ("image", normals, defectives, _IMAGE),
        ("pixel", pixels.negatives, pixels.positives, _PIXEL),
    ):
        if negatives.any() and positives.any():
            recall, rate, precision = _rates(negatives, positives)
            label = f"{name}: AUROC {auroc(negatives, positives):.3f}"
            roc.plot(rate, recall, label=label, **style)
            # steps: average precision is the area under a step function
            label = f"{name}: AUPR {average_precision(negatives, positives):.3f}"
            precision_recall.step(recall, precision, where="pre", label=label, **style)
    if outcome.threshold is not None and normals.any() and defectives.any():
        flagged = is_flagged(scores, outcome.threshold).sum()
        recall, rate, precision = (values[flagged] for values in _rates(normals, defectives))
        roc.plot(rate, recall, label="the model's threshold", **_THRESHOLD)
        precision_recall.plot(recall, precision, label="the model's threshold", **_THRESHOLD)
    if pixels.regions and pixels.negatives.any():
        area = aupro(pixels.negatives, pixels.overlaps, pixels.regions)
        _, rate, _ = _rates(pixels.negatives, pixels.positives)
        mean = count_flagged(pixels.overlaps) / pixels.regions
        overlap.plot(rate, mean, label=f"pixel: AUPRO {area:.3f}", **_PIXEL)
    overlap.set_xlim(-0.02 * AUPRO_LIMIT, 1.02 * AUPRO_LIMIT)

    for panel in (roc, precision_recall, overlap):
        if panel.lines:  # the legend goes below, where it can't cover a curve
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
        else:
            panel.text(0.5, 0.5, "undefined", transform=panel.transAxes, ha="center")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _panel(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)


def _rates(negatives: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, ...]:
    """Recall, false-positive rate and precision as the threshold falls, each (bins + 1,).

    The precision is 1 while nothing is flagged.
    """
    false, true = count_flagged(negatives), count_flagged(positives)
    flagged = false + true
    precision = np.divide(true, flagged, out=np.ones_like(true), where=flagged > 0)
    return true / true[-1], false / false[-1], precision
