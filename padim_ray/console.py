"""What commands show people on a terminal; names in a model may be anything."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from padim_ray.versions import ALPHA, GroupInfo, ModelInfo


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
