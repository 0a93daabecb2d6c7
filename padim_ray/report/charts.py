"""Charts as inline SVG. Their colours are the page's CSS variables, for light and dark mode."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from padim_ray.scoring.heatmap import COLORMAP, FIRST_COLOR

MAX_BARS = 60
# placeholders, replaced by the page's colours in the SVG
_INK, _RUN, _TRAINING, _THRESHOLD = "#000001", "#000002", "#000003", "#000004"
_PAGE_COLORS = {
    _INK: "var(--muted)",
    _RUN: "var(--run)",
    _TRAINING: "var(--ink)",
    _THRESHOLD: "var(--alarm)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "padim-ray",
    "font.size": 8.5,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def draw_score_histogram(histogram: Mapping[str, Any], threshold: float | None) -> Markup | None:
    """A run's scores, filled, and the training images' leave-one-out scores, outlined.

    Both are shares of their images. The axis has a square-root scale, so that a few defective
    images are visible beside many good ones.

    Args:
        histogram: `edges` (m + 1), positive and in equal ratios; `scores` and `leave_one_out`,
            counts (m).
        threshold: drawn as a dashed line.

    Returns:
        None if there is nothing to draw.
    """
    edges, (scores, training) = _trim(
        np.asarray(histogram["edges"], float),
        [np.asarray(histogram[name], float) for name in ("scores", "leave_one_out")],
    )
    if not scores.any() and not training.any():
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 1.9), layout="constrained")
        axes = figure.add_subplot()
        axes.stairs(_shares(scores), edges, fill=True, color=_RUN, alpha=0.55, linewidth=0)
        axes.stairs(_shares(training), edges, color=_TRAINING, linewidth=1.2)
        _scale_scores(axes, edges, threshold)
        _scale_shares(axes)
        if threshold is not None:
            axes.axvline(threshold, color=_THRESHOLD, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.set_xlabel("score")
        return _svg(figure)


def draw_score_pairs(
    before: np.ndarray,
    after: np.ndarray,
    has_flipped: np.ndarray,
    thresholds: tuple[float | None, float | None],
) -> Markup | None:
    """A scatter plot of each image's scores by two models, with the diagonal.

    Args:
        before: scores by the first model, (n,), positive.
        after: scores by the second model, (n,), positive.
        has_flipped: whether the image's decision changed, (n,) bool.
        thresholds: of both models, drawn as dashed lines.

    Returns:
        None if there is nothing to draw.
    """
    if not len(before):
        return None
    known = [threshold for threshold in thresholds if threshold]
    ends = np.concatenate([before, after, known])
    low, high = ends.min() * 0.97, ends.max() * 1.03
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([low, high], [low, high], color=_INK, alpha=0.5, linewidth=0.8)
        for threshold, draw in zip(thresholds, (axes.axvline, axes.axhline), strict=True):
            if threshold:
                draw(threshold, color=_THRESHOLD, linewidth=1.2, linestyle=(0, (4, 2)))
        for chosen, color, size in ((~has_flipped, _RUN, 9), (has_flipped, _THRESHOLD, 18)):
            axes.scatter(before[chosen], after[chosen], size, color=color, alpha=0.6, linewidths=0)
        _scale_scores(axes, np.array([low, high]), None)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(axes.xaxis.get_major_locator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(axes.xaxis.get_major_formatter())
        axes.set_xlabel("score before")
        axes.set_ylabel("score after")
        return _svg(figure)


def heat_colors() -> list[str]:
    """The colours of the heatmaps as hex codes, from low to high distances."""
    shades = FIRST_COLOR + (1 - FIRST_COLOR) * np.linspace(0, 1, 8)
    return [matplotlib.colors.to_hex(color) for color in matplotlib.colormaps[COLORMAP](shades)]


def _trim(
    edges: np.ndarray, counts: Sequence[np.ndarray]
) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    """Drop empty bins at both ends, and join neighbours until at most `MAX_BARS` are left."""
    filled = np.flatnonzero(np.sum(counts, axis=0))
    if not len(filled):
        return edges, counts
    first, last = filled[0], filled[-1] + 1
    step = -(-(last - first) // MAX_BARS)
    starts = np.arange(first, last, step)
    joined = [np.add.reduceat(count[:last], starts) for count in counts]
    return np.append(edges[starts], edges[last]), joined


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1)


def _scale_scores(axes: Axes, edges: np.ndarray, threshold: float | None) -> None:
    """Give the x-axis a logarithmic scale over the edges and the threshold."""
    low, high = edges[0], edges[-1]
    if threshold:
        low, high = min(low, threshold), max(high, threshold)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = np.log10(high / low)
    ticks = (1, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _scale_shares(axes: Axes) -> None:
    """Give the y-axis a square-root scale, in percent."""
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    top = axes.dataLim.ymax * 1.05
    axes.set_ylim(0, top)
    candidates = [0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 1]
    axes.yaxis.set_major_locator(FixedLocator([c for c in candidates if top / 300 < c <= top]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.grid(axis="y", color=_INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _svg(figure: Figure) -> Markup:
    """The figure as an inline SVG element, without the parts that only an SVG file needs."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(
        r' id="(?!C\d)[\w.]+_\d+"', "", svg
    )  # not unique in the page, and never referred to
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r"\n\s*", "\n", svg).replace("xlink:href", "href")
    for drawn, shown in _PAGE_COLORS.items():
        svg = svg.replace(drawn, shown)
    return Markup(svg)
