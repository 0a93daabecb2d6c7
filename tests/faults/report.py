"""What faults did to rows: comparisons with an undisturbed run, and the table at the end."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from padim_ray.model.version import ModelVersion
from tests.densities.test_moments import assert_close

SCORE_TOLERANCE = 1e-4
MOMENTS_TOLERANCE = 1e-6  # of a block's largest entry


@dataclass(frozen=True)
class Differences:
    """Numbers of rows."""

    lost: int = 0
    twice: int = 0
    wrong: int = 0

    def __bool__(self) -> bool:
        return bool(self.lost or self.twice or self.wrong)

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(
            self.lost + other.lost, self.twice + other.twice, self.wrong + other.wrong
        )


@dataclass
class Ledger:
    """The session's faults and what came of them. `kills`: by kind of process."""

    lines: list[tuple[str, int, Differences]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)

    def add(self, fault: str, times: int, differences: Differences) -> None:
        self.lines.append((fault, times, differences))

    def add_kills(self, fault: str, kills: Counter[str], differences: Differences) -> None:
        """Add a line whose fault is the end of processes."""
        self.kills += kills
        self.add(fault, kills.total(), differences)

    def render(self) -> list[str]:
        """The table, in lines."""
        width = max(len(fault) for fault, _, _ in self.lines)
        head = f"{'fault':<{width}}  {'injected':>8}  {'rows lost':>9}  {'rows twice':>10}  "
        lines = [f"{head}{'rows wrong':>10}"]
        for fault, times, found in self.lines:
            lines.append(
                f"{fault:<{width}}  {times:>8}  {found.lost:>9}  {found.twice:>10}  "
                f"{found.wrong:>10}"
            )
        return lines


def read_results(out: Path) -> list[dict[str, Any]]:
    """A scoring run's rows, of all files in its directory; none if it has none."""
    parts = sorted((out / "results").glob("part-*.parquet"))
    return pa.concat_tables(map(pq.read_table, parts)).to_pylist() if parts else []


def compare_results(
    expected: Sequence[dict[str, Any]], actual: Sequence[dict[str, Any]]
) -> Differences:
    """A disturbed scoring run's rows beside an undisturbed one's.

    Wrong are rows with another status, score or verdict, and those of images that aren't expected.
    """
    return _compare(
        expected,
        actual,
        number="score",
        same=("status", "error", "group", "is_anomalous", "width", "height"),
    )


def compare_models(expected: ModelVersion, actual: ModelVersion) -> Differences:
    """A disturbed fit's model beside an undisturbed one's.

    Wrong are images with another status or leave-one-out score, and all of a group with other
    moments.
    """
    tables = [
        pq.read_table(f"{version.root.uri}/versions/{version.number:06d}/manifest.parquet")
        for version in (expected, actual)
    ]
    rows = [table.to_pylist() for table in tables]
    found = _compare(*rows, number="leave_one_out_score", same=("status", "error", "group"))
    wrong = found.wrong
    for group, entry in expected.groups.items():
        if not _have_equal_moments(expected, actual, group):
            wrong += entry.images
    return Differences(found.lost, found.twice, wrong)


def _have_equal_moments(expected: ModelVersion, actual: ModelVersion, group: str) -> bool:
    moments = [version.load_statistics(group) for version in (expected, actual)]
    try:
        assert_close(*moments, MOMENTS_TOLERANCE)
    except AssertionError:
        return False
    return True


def _compare(
    expected: Sequence[dict[str, Any]],
    actual: Sequence[dict[str, Any]],
    *,
    number: str,
    same: Sequence[str],
) -> Differences:
    wanted = {row["uri"]: row for row in expected}
    counts = Counter(row["uri"] for row in actual)
    wrong = 0
    for row in actual:
        model = wanted.get(row["uri"])
        wrong += not (
            model
            and all(row[name] == model[name] for name in same)
            and _are_close(row[number], model[number])
        )
    return Differences(
        lost=len(wanted.keys() - counts.keys()),
        twice=sum(count - 1 for count in counts.values()),
        wrong=wrong,
    )


def _are_close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=SCORE_TOLERANCE)
