"""Print plans and models on a terminal.

Names in a model come from users, so they are escaped.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from padim_ray.model.history import ALPHA, GroupInfo, ModelInfo, VersionInfo
from padim_ray.storage.disk import format_size

if TYPE_CHECKING:
    from padim_ray.planning.plan import PlanReport

SIZES = ("MB", "statistics", "density")
"""Names of the columns with sizes in MB."""


def print_json(value: Any) -> None:
    """Print JSON for programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def print_info(info: ModelInfo) -> None:
    """Print a model's history, and the settings and groups of one version."""
    console = _console()
    console.print(_text(info.model), end="\n\n")
    history = _table("version", "", "created", "groups", "images", *SIZES, "")
    for version in info.versions:
        history.add_row(
            *(str(version.number), "current" * (version.number == info.current)),
            *(_text(version.created_at), str(version.groups), str(version.images)),
            *_sizes(version),
            _text(version.why),
        )
    console.print(history)
    console.print(f"{format_size(info.bytes)} in all\n")
    console.print(f"Version {info.number} (trunk weights: {_megabytes(info.trunk_bytes)} MB)\n")
    settings = _table("setting", "")
    for name, value in _flat(info.settings):
        settings.add_row(name, _text(value))
    console.print(settings)
    console.print()
    groups = _table(
        *("group", "images", "failed", "calibrated", "median score", f"threshold at {ALPHA}"),
        *SIZES,
    )
    for name, group in info.groups.items():
        groups.add_row(_text(name), *_cells(group))
    console.print(groups)


def print_plan(plan: "PlanReport") -> None:
    """Print the forecasts of all jobs, side by side."""
    console = _console()
    size = "of unknown size" if plan.bytes is None else format_size(plan.bytes)
    console.print(f"{plan.images:,} images in {plan.groups:,} groups, {size}")
    state, features = plan.state, plan.features
    height, width = features["input"]
    console.print(
        f"{features['backbone']}, {features['channels']} channels, {height} × {width}, "
        f"{features['precision']}: {format_size(state.density)} of density per group"
    )
    cluster = plan.plan
    kind = "GPU" if cluster.actor.gpus else "CPU"
    console.print(
        f"{cluster.actors} {kind} actors, {cluster.decode_tasks} concurrent decoding tasks"
    )
    rates = plan.rates
    if rates.score:
        console.print(
            f"An actor fits {_count(rates.fit)} and scores {_count(rates.score)} images/s "
            f"({_text(rates.source)})"
        )
    if rates.decode:
        per_gpu = plan.decode_cores_per_gpu
        console.print(
            f"A core decodes {_count(rates.decode)} images/s (measured here)"
            + (f": {per_gpu:.1f} cores keep a GPU busy" if per_gpu else "")
        )
    console.print()
    table = _table("", *(job.job for job in plan.jobs))
    for name, cell in {
        "hours": lambda job: _hours(job.hours),
        "bound by": lambda job: job.bound,
        "read from storage": lambda job: format_size(job.read_bytes),
        "read rate": lambda job: (
            "" if job.bytes_per_second is None else f"{format_size(job.bytes_per_second)}/s"
        ),
        "model state, read or written": lambda job: format_size(job.state_bytes),
        "other writes, at most": lambda job: format_size(job.written_bytes),
        "through the object store": lambda job: format_size(job.object_store_bytes),
        "object store of all nodes": lambda job: format_size(job.object_store_at_once),
        "an actor's memory": lambda job: format_size(job.actor_bytes),
        **(
            {"an actor's GPU memory": lambda job: format_size(job.device_bytes)}
            if cluster.actor.gpus
            else {}
        ),
        "the driver's memory": lambda job: format_size(job.driver_bytes),
        "partial sums": lambda job: f"{job.partial_sums:,}" if job.partial_sums else "",
        "merges": lambda job: f"{job.merges:,}" if job.partial_sums else "",
    }.items():
        table.add_row(name, *map(cell, plan.jobs))
    console.print(table)
    for warning in plan.warnings:
        console.print(_text(f"! {warning}"))


def _console() -> Console:
    # output to a pipe or file isn't wrapped, so that programs find whole lines
    return Console(width=None if sys.stdout.isatty() else 500, highlight=False)


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return f"{hours:,.2f}" if hours >= 0.01 else "below 0.01"


def _count(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _cells(group: GroupInfo) -> list[str]:
    scores = [
        f"{score:.2f}" if score is not None else "" for score in (group.median, group.threshold)
    ]
    counts = [str(count) for count in (group.images, group.failed, group.calibrated)]
    return [*counts, *scores, *_sizes(group)]


def _sizes(info: VersionInfo | GroupInfo) -> list[str]:
    return [_megabytes(size) for size in (info.bytes, info.statistics_bytes, info.density_bytes)]


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        is_text = name in ("", "created", "setting", "group")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to pairs of dotted names and values."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            shown = " × ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            lines.append((prefix + name, shown))
    return lines


def _text(value: str) -> Text:
    """Escape control characters; the result isn't parsed as markup."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in value))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
