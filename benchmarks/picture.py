"""The report as a chart: images/s of stages, jobs and peers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.timing import Figure

BAR_HEIGHT = 0.3  # inches


def draw_picture(report: dict, path: Path) -> None:
    """Draw a panel per section that measured images/s: a bar per figure, a line from min to max."""
    rows = [row for row in report["figures"] if row["unit"] == "images/s"]
    panels: dict[str, list[Figure]] = {}
    for row in rows:
        panels.setdefault(row["stage"], []).append(row)
    if not panels:
        return
    heights = [len(panel) + 1.5 for panel in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, BAR_HEIGHT * sum(heights) + 0.8),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
        squeeze=False,
    )
    for axis, (stage, panel) in zip(axes[:, 0], panels.items(), strict=True):
        names = [row["what"] for row in panel]
        medians = [row["median"] for row in panel]
        spread = [
            [row["median"] - row["min"] for row in panel],
            [row["max"] - row["median"] for row in panel],
        ]
        bars = axis.barh(names, medians, xerr=spread, color="#4477aa", error_kw={"lw": 1})
        axis.bar_label(bars, [f" {value:,.0f}" for value in medians], padding=4, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(stage, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images/s (median, minimum to maximum)", fontsize=8)
    machine = report["machine"]
    figure.suptitle(
        f"{machine['processor']}, {machine['cores']} cores, GPU: {machine['gpu']}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
