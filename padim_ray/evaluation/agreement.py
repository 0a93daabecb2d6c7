"""Do two models agree on an archive: the ranks, the decisions and the scores of the same images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from padim_ray.scoring.decision import Decision

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SMALLEST_SCORE = 1e-12  # of which there are ratios


@dataclass(frozen=True, eq=False)
class Verdicts:
    """A group's scores (n,) by one model, NaN where an image failed, and how it judges them."""

    scores: np.ndarray
    decision: Decision

    @property
    def threshold(self) -> float | None:
        return self.decision.threshold

    @cached_property
    def flags(self) -> np.ndarray:
        """Which images are anomalous, (n,)."""
        return self.decision.flags(self.scores)


@dataclass(frozen=True)
class GroupComparison:
    """How far two models agree on a group.

    `compared`: images that both scored; all else is of these. `rank_correlation`: Spearman's, None
    where it isn't defined. `newly_flagged`: images that only the second model calls anomalous;
    `no_longer_flagged`: only the first. `ratio_quantiles`: of the second model's scores over the
    first's, by `QUANTILES`.
    """

    listed: int
    compared: int
    rank_correlation: float | None
    threshold_before: float | None
    threshold_after: float | None
    flagged_before: int
    flagged_after: int
    newly_flagged: int
    no_longer_flagged: int
    ratio_quantiles: Mapping[str, float]

    @classmethod
    def of(cls, before: Verdicts, after: Verdicts) -> "GroupComparison":
        """From the same images, judged by both."""
        both = np.isfinite(before.scores) & np.isfinite(after.scores)
        x, y = before.scores[both].astype(float), after.scores[both].astype(float)
        was, is_ = before.flags[both], after.flags[both]
        ratios = np.quantile(_log_ratio(x, y), QUANTILES) if len(x) else []
        return cls(
            listed=len(both),
            compared=len(x),
            rank_correlation=_rank_correlation(x, y),
            threshold_before=before.threshold,
            threshold_after=after.threshold,
            flagged_before=int(was.sum()),
            flagged_after=int(is_.sum()),
            newly_flagged=int((is_ & ~was).sum()),
            no_longer_flagged=int((was & ~is_).sum()),
            ratio_quantiles={
                f"{q:g}": float(np.exp(r)) for q, r in zip(QUANTILES, ratios, strict=False)
            },
        )


@dataclass(frozen=True)
class Comparison:
    """How far two models agree on an archive.

    `before`, `after`: their names. `groups`: by name. `left_out`: images of groups that only one of
    the models has, by group. `seconds`: wall time of this attempt, and `stages` what of it each
    took.
    """

    before: str
    after: str
    images: str
    alpha: float
    started_at: str
    finished_at: str
    groups: Mapping[str, GroupComparison]
    left_out: Mapping[str, int]
    seconds: float
    stages: Mapping[str, float]

    def total(self, name: str) -> int:
        """The sum of a field over the groups."""
        return sum(getattr(group, name) for group in self.groups.values())

    @property
    def changed(self) -> int:
        """Images of which the decision changed."""
        return self.total("newly_flagged") + self.total("no_longer_flagged")

    @property
    def lowest_rank_correlation(self) -> tuple[str, float] | None:
        """The group whose images' order changed most, and its rank correlation."""
        known = [
            (group.rank_correlation, name)
            for name, group in self.groups.items()
            if group.rank_correlation is not None
        ]
        return min(known)[::-1] if known else None

    def to_json(self) -> dict[str, Any]:
        names = ("listed", "compared", "flagged_before", "flagged_after")
        more = ("newly_flagged", "no_longer_flagged")
        return asdict(self) | {name: self.total(name) for name in names + more}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """Raises: KeyError or TypeError if that isn't what `to_json` makes."""
        values = {name: content[name] for name in cls.__dataclass_fields__}
        groups = {name: GroupComparison(**group) for name, group in content["groups"].items()}
        return cls(**values | {"groups": groups})


def measure_changes(before: Verdicts, after: Verdicts) -> np.ndarray:
    """By what factor each image's score changed, (n,) float64; NaN where one of them failed.

    Scores are taken in units of their model's threshold, where both have one: a model whose scores
    and threshold are both twice as large has changed nothing.
    """
    x, y = before.scores.astype(float), after.scores.astype(float)
    if before.threshold and after.threshold:
        x, y = x / before.threshold, y / after.threshold
    return np.exp(_log_ratio(x, y))


def order_by_change(changes: np.ndarray, has_flipped: np.ndarray) -> np.ndarray:
    """Rows, those whose decision changed first, then by how far from 1 the factor is.

    Args:
        changes: factors (n,); rows without one (NaN) are left out.
        has_flipped: (n,), whether an image's decision changed.
    """
    size = np.abs(np.log(changes))
    order = np.lexsort([-size, ~has_flipped])  # stable: ties in the rows' order
    return order[np.isfinite(changes[order])]


def _log_ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(y, SMALLEST_SCORE)) - np.log(np.maximum(x, SMALLEST_SCORE))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(stats.spearmanr(x, y).statistic)
