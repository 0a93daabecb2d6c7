"""Agreement of two models on the same images: ranks, decisions and ratios of scores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from padim_ray.scoring.decision import Decision

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MIN_SCORE = 1e-12  # lower scores count as this one, so that ratios are defined
_TOTALS = (
    *("listed", "compared", "flagged_before", "flagged_after"),
    *("newly_flagged", "no_longer_flagged"),
)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """One model's scores of a group's images, (n,), and its decision.

    Scores of failed images are NaN.
    """

    scores: np.ndarray
    decision: Decision

    @property
    def threshold(self) -> float | None:
        """The model's image threshold, if it has one."""
        return self.decision.threshold

    @cached_property
    def flags(self) -> np.ndarray:
        """Which images are anomalous, (n,)."""
        return self.decision.flags(self.scores)


@dataclass(frozen=True)
class GroupComparison:
    """Agreement of two models on one group.

    `listed`: all images. `compared`: images that both models scored; all other fields are about
    these. `rank_correlation`: Spearman's, None if it is undefined. `newly_flagged`: images that are
    anomalous only by the second model. `no_longer_flagged`: only by the first. `ratio_quantiles`:
    quantiles of the second model's score over the first's, keyed by `QUANTILES` as text.
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
        """Compare both models' verdicts on the same images, in the same order."""
        both = np.isfinite(before.scores) & np.isfinite(after.scores)
        x, y = before.scores[both].astype(float), after.scores[both].astype(float)
        flagged_before, flagged_after = before.flags[both], after.flags[both]
        ratios = np.quantile(_log_ratio(x, y), QUANTILES) if len(x) else []
        return cls(
            listed=len(both),
            compared=len(x),
            rank_correlation=_rank_correlation(x, y),
            threshold_before=before.threshold,
            threshold_after=after.threshold,
            flagged_before=int(flagged_before.sum()),
            flagged_after=int(flagged_after.sum()),
            newly_flagged=int((flagged_after & ~flagged_before).sum()),
            no_longer_flagged=int((flagged_before & ~flagged_after).sum()),
            ratio_quantiles={
                f"{q:g}": float(np.exp(r)) for q, r in zip(QUANTILES, ratios, strict=False)
            },
        )


@dataclass(frozen=True)
class Comparison:
    """Agreement of two models on an archive.

    `before`, `after`: names of the models. `images`: the archive. `alpha`: the false-alarm rate of
    both models' thresholds. `groups`: by name. `left_out`: number of images per group that only one
    model has. `seconds`: wall time of this attempt; `stages`: wall time of each of its stages.
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
        """Number of images whose decision changed."""
        return self.total("newly_flagged") + self.total("no_longer_flagged")

    @property
    def lowest_rank_correlation(self) -> tuple[str, float] | None:
        """The group with the lowest rank correlation, and that; None if no group has one."""
        known = [
            (group.rank_correlation, name)
            for name, group in self.groups.items()
            if group.rank_correlation is not None
        ]
        return min(known)[::-1] if known else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and the totals over the groups."""
        return asdict(self) | {name: self.total(name) for name in _TOTALS}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """Restore what `to_json` returned.

        Raises:
            KeyError, TypeError: if it is anything else.
        """
        values = {name: content[name] for name in cls.__dataclass_fields__}
        groups = {name: GroupComparison(**group) for name, group in content["groups"].items()}
        return cls(**values | {"groups": groups})


def measure_changes(before: Verdicts, after: Verdicts) -> np.ndarray:
    """The factor by which each image's score changed, (n,) float64; NaN if a model failed on it.

    If both models have a threshold, scores are divided by it first: doubling all scores and the
    threshold changes nothing.
    """
    x, y = before.scores.astype(float), after.scores.astype(float)
    if before.threshold and after.threshold:
        x, y = x / before.threshold, y / after.threshold
    return np.exp(_log_ratio(x, y))


def order_by_change(changes: np.ndarray, has_flipped: np.ndarray) -> np.ndarray:
    """Indices of the images, most changed first.

    Changed decisions come before all others; within both, images are ordered by |log factor|.

    Args:
        changes: factors (n,); images with NaN are left out.
        has_flipped: (n,) bool, whether the decision changed.
    """
    size = np.abs(np.log(changes))
    order = np.lexsort([-size, ~has_flipped])  # stable: ties keep their order
    return order[np.isfinite(changes[order])]


def _log_ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(y, MIN_SCORE)) - np.log(np.maximum(x, MIN_SCORE))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(stats.spearmanr(x, y).statistic)
