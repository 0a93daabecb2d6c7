"""The curves behind the figures: ROC, precision-recall and per-region overlap."""

import io

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

IMAGE = {"color": "#0072B2", "linestyle": "-"}  # Okabe and Ito's colours, for all kinds of sight
PIXEL = {"color": "#D55E00", "linestyle": "--"}
THRESHOLD = {"color": "black", "marker": "D", "markersize": 7, "linestyle": "none"}
LONGEST_TITLE = 100


def draw_curves(group: str, outcome: GroupOutcome, normal: str) -> bytes:
    """A PNG, 1200 × 480 pixels, with three panels: ROC, precision-recall, per-region overlap.

    Curves whose figure isn't defined are left out. A diamond marks the model's own threshold.
    """
    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    figure.suptitle(" ".join(group.split())[:LONGEST_TITLE], parse_math=False)
    roc, precision_recall, overlap = figure.subplots(1, 3)
    _panel(roc, "ROC", "False-positive rate", "True-positive rate")
    _panel(precision_recall, "Precision-recall", "Recall", "Precision")
    _panel(overlap, "Per-region overlap (PRO)", "False-positive rate of pixels", "Mean overlap")

    scores, normals, defectives = count_scores(outcome.scores, ~outcome.images_of([normal]))
    pixels = outcome.pixels_of(outcome.pixels)
    for name, negatives, positives, style in (
        ("image", normals, defectives, IMAGE),
        ("pixel", pixels.negatives, pixels.positives, PIXEL),
    ):
        if negatives.any() and positives.any():
            recall, rate, precision = _rates(negatives, positives)
            area = auroc(negatives, positives)
            roc.plot(rate, recall, label=f"{name}: AUROC {area:.3f}", **style)
            area = average_precision(negatives, positives)
            # each recall with its own precision, as steps: that is what AUPR is the area of
            precision_recall.step(
                recall, precision, where="pre", label=f"{name}: AUPR {area:.3f}", **style
            )
    if outcome.threshold is not None and normals.any() and defectives.any():
        flagged = is_flagged(scores, outcome.threshold).sum()
        recall, rate, precision = (values[flagged] for values in _rates(normals, defectives))
        roc.plot(rate, recall, label="the model's threshold", **THRESHOLD)
        precision_recall.plot(recall, precision, label="the model's threshold", **THRESHOLD)
    if pixels.regions and pixels.negatives.any():
        area = aupro(pixels.negatives, pixels.overlaps, pixels.regions)
        _, rate, _ = _rates(pixels.negatives, pixels.positives)
        mean = count_flagged(pixels.overlaps) / pixels.regions
        overlap.plot(rate, mean, label=f"pixel: AUPRO {area:.3f}", **PIXEL)
    overlap.set_xlim(-0.02 * AUPRO_LIMIT, 1.02 * AUPRO_LIMIT)

    for panel in (roc, precision_recall, overlap):
        if panel.lines:
            # below the panel, where no curve is
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
    """Recall, false-positive rate and precision as the threshold falls: each (bins + 1,).

    Precision where nothing is flagged is 1, where the curve begins.
    """
    false, true = count_flagged(negatives), count_flagged(positives)
    flagged = false + true
    precision = np.divide(true, flagged, out=np.ones_like(true), where=flagged > 0)
    return true / true[-1], false / false[-1], precision
