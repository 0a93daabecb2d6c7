"""Numbers and times in words."""

import math
from collections.abc import Sequence
from datetime import datetime


def count(number: int, noun: str) -> str:
    """`1 image`, `12,000 images`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def percent(part: float, whole: float = 1) -> str:
    """A share with two digits; `<0.01 %` and `>99.9 %` if it is close to 0 or to the whole."""
    share = 100 * part / max(whole, 1)
    if 0 < share < 0.01:
        return "<0.01 %"
    if 99.9 < share < 100:
        return ">99.9 %"
    return f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def figure(value: float | None, digits: int = 4) -> str:
    """A measured value to a number of significant digits; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value) or 10**-4 < abs(value) < 10**digits:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def moment(iso: str) -> str:
    """`2026-11-20 05:12 UTC`, from a time in ISO format."""
    time = datetime.fromisoformat(iso)
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def join_some(names: Sequence[str], limit: int, noun: str = "") -> str:
    """`a, b, 3 more`: the first names, and the number of others."""
    more = len(names) - limit
    rest = [f"{more:,} more {noun}".strip()] if more > 0 else []
    return ", ".join([*names[:limit], *rest])
