"""What commands show people on a terminal; names in a model may be anything."""

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from padim_ray.model.history import ALPHA, GroupInfo, ModelInfo

if TYPE_CHECKING:
    from padim_ray.planning.plan import PlanReport


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def print_info(info: ModelInfo) -> None:
    """A model's history, and one version's settings and groups."""
    # what isn't a terminal has no width: a program that looks for a line finds all of it
    console = Console(width=None if sys.stdout.isatty() else 500, highlight=False)
    console.print(_text(info.model), end="\n\n")
    history = _table("version", "", "created", "groups", "images", "MB", "")
    for version in info.versions:
        history.add_row(
            *(str(version.number), "current" * (version.number == info.current)),
            *(_text(version.created_at), str(version.groups), str(version.images)),
            *(_megabytes(version.bytes), _text(version.why)),
        )
    console.print(history)
    console.print(
        f"\nVersion {info.number}, and {_megabytes(info.trunk_bytes)} MB of the trunk's weights\n"
    )
    settings = _table("setting", "")
    for name, value in _flat(info.settings):
        settings.add_row(name, _text(value))
    console.print(settings)
    console.print()
    groups = _table(
        *("group", "images", "failed", "calibrated", "median score", f"threshold at {ALPHA}", "MB")
    )
    for name, group in info.groups.items():
        groups.add_row(_text(name), *_cells(group))
    console.print(groups)


def print_plan(plan: "PlanReport") -> None:
    """What jobs would take, side by side."""
    console = Console(width=None if sys.stdout.isatty() else 500, highlight=False)
    size = "of unknown size" if plan.bytes is None else f"{_size(plan.bytes)} on storage"
    console.print(f"{plan.images:,} images in {plan.groups:,} groups, {size}")
    state, features = plan.state, plan.features
    height, width = features["input"]
    console.print(
        f"{features['backbone']}, {features['channels']} channels, {height} × {width}, "
        f"{features['precision']}: {_size(state.density)} of density per group"
    )
    cluster = plan.plan
    kind = "GPU" if cluster.actor.gpus else "CPU"
    console.print(f"{cluster.actors} {kind} actors, {cluster.decode_tasks} decoding tasks at once")
    rates = plan.rates
    if rates.score:
        console.print(
            f"An actor sums up {_count(rates.fit)} and scores {_count(rates.score)} images/s "
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
        "read from storage": lambda job: _size(job.read_bytes),
        "… while it runs": lambda job: (
            "" if job.bytes_per_second is None else f"{_size(job.bytes_per_second)}/s"
        ),
        "model state, read or written": lambda job: _size(job.state_bytes),
        "written besides, at most": lambda job: _size(job.written_bytes),
        "through the object store": lambda job: _size(job.object_store_bytes),
        "object store, all nodes'": lambda job: _size(job.object_store_at_once),
        "an actor's memory": lambda job: _size(job.actor_bytes),
        **(
            {"an actor's GPU memory": lambda job: _size(job.device_bytes)}
            if cluster.actor.gpus
            else {}
        ),
        "the driver's memory": lambda job: _size(job.driver_bytes),
        "partial sums": lambda job: f"{job.partial_sums:,}" if job.partial_sums else "",
        "merges": lambda job: f"{job.merges:,}" if job.partial_sums else "",
    }.items():
        table.add_row(name, *map(cell, plan.jobs))
    console.print(table)
    for warning in plan.warnings:
        console.print(_text(f"! {warning}"))


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return f"{hours:,.2f}" if hours >= 0.01 else "below 0.01"


def _count(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _size(size: float) -> str:
    """In the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def _cells(group: GroupInfo) -> list[str]:
    scores = [
        f"{score:.2f}" if score is not None else "" for score in (group.median, group.threshold)
    ]
    counts = [str(count) for count in (group.images, group.failed, group.calibrated)]
    return [*counts, *scores, _megabytes(group.bytes)]


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        is_text = name in ("", "created", "setting", "group")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            shown = " × ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            lines.append((prefix + name, shown))
    return lines


def _text(value: str) -> Text:
    """Neither markup nor control characters."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in value))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
