"""Comparisons of disturbed with undisturbed runs, and the table of all faults."""

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
MOMENTS_TOLERANCE = 1e-6  # relative to a block's largest entry


@dataclass(frozen=True)
class Differences:
    """Numbers of rows that were lost, written twice, or wrong."""

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
    """All injected faults and their effects. `kills`: number of kills by kind of process."""

    lines: list[tuple[str, int, Differences]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)

    def add(self, fault: str, times: int, differences: Differences) -> None:
        self.lines.append((fault, times, differences))

    def add_kills(self, fault: str, kills: Counter[str], differences: Differences) -> None:
        """Add a line for killed processes."""
        self.kills += kills
        self.add(fault, kills.total(), differences)

    def render(self) -> list[str]:
        """The lines of the table."""
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
    """All rows of a scoring run's results; none if there are none."""
    parts = sorted((out / "results").glob("part-*.parquet"))
    return pa.concat_tables(map(pq.read_table, parts)).to_pylist() if parts else []


def compare_results(
    expected: Sequence[dict[str, Any]], actual: Sequence[dict[str, Any]]
) -> Differences:
    """Compare the rows of a disturbed scoring run with those of an undisturbed one.

    A row is wrong if its status, score or verdict differs, or if its image isn't expected.
    """
    return _compare(
        expected,
        actual,
        number="score",
        same=("status", "error", "group", "is_anomalous", "width", "height"),
    )


def compare_models(expected: ModelVersion, actual: ModelVersion) -> Differences:
    """Compare the model of a disturbed fit with that of an undisturbed one.

    An image is wrong if its status or leave-one-out score differs, or if its group's moments do.
    """
    rows = [version.load_manifest().to_pylist() for version in (expected, actual)]
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
