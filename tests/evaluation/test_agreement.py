import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.evaluation.agreement import (
    QUANTILES,
    Comparison,
    GroupComparison,
    Verdicts,
    measure_changes,
    order_by_change,
)
from padim_ray.scoring.decision import Decision


def judge(scores, threshold):
    decision = Decision(threshold, threshold, np.empty(0, np.float32))
    return Verdicts(np.asarray(scores, np.float32), decision)


def random_verdicts(seed, images=40, threshold=20.0):
    rng = np.random.default_rng(seed)
    scores = rng.integers(5, 40, images).astype(np.float32)  # with ties
    scores[rng.random(images) < 0.1] = np.nan
    return judge(scores, threshold)


@given(st.integers(0, 2**32))
def test_figures_equal_those_of_pandas(seed):
    before, after = random_verdicts(seed), random_verdicts(seed + 1, threshold=25.0)
    group = GroupComparison.of(before, after)
    frame = pd.DataFrame({"x": before.scores, "y": after.scores}).astype(float)
    known = frame.dropna()
    assert (group.listed, group.compared) == (len(frame), len(known))
    assert group.rank_correlation == pytest.approx(known["x"].corr(known["y"], "spearman"))
    decided = pd.crosstab(known["x"] > 20, known["y"] > 25)

    def count(flagged_before, flagged_after):
        return int(decided.get(flagged_after, pd.Series(dtype=int)).get(flagged_before, 0))

    assert group.newly_flagged == count(False, True)
    assert group.no_longer_flagged == count(True, False)
    assert group.flagged_before == int((known["x"] > 20).sum())
    assert group.flagged_after == int((known["y"] > 25).sum())
    ratios = np.log(known["y"] / known["x"]).quantile(QUANTILES)
    assert list(group.ratio_quantiles) == [f"{q:g}" for q in QUANTILES]
    np.testing.assert_allclose(list(group.ratio_quantiles.values()), np.exp(ratios), rtol=1e-6)


def test_models_that_agree_have_changed_nothing():
    before = random_verdicts(1)
    twice = judge(2 * before.scores, 2 * 20.0)
    group = GroupComparison.of(before, twice)
    assert group.rank_correlation == pytest.approx(1)
    assert group.newly_flagged == group.no_longer_flagged == 0
    changes = measure_changes(before, twice)
    np.testing.assert_allclose(changes[np.isfinite(before.scores)], 1, rtol=1e-6)
    assert np.isnan(changes[np.isnan(before.scores)]).all()
    # without a threshold, scores are compared as they are
    changes = measure_changes(before, judge(2 * before.scores, None))
    np.testing.assert_allclose(changes[np.isfinite(before.scores)], 2, rtol=1e-6)


def test_changed_decisions_come_first_then_the_largest_factors():
    changes = np.array([1.0, 0.1, np.nan, 3.0, 1.2, 1 / 3.5])
    flipped = np.array([False, False, False, False, True, False])
    assert order_by_change(changes, flipped).tolist() == [4, 1, 5, 3, 0]


@pytest.mark.parametrize("scores", [[], [3.0], [3.0, 3.0], [np.nan, np.nan]])
def test_an_undefined_rank_correlation_is_none(scores):
    group = GroupComparison.of(judge(scores, 1.0), judge(scores, 1.0))
    assert group.rank_correlation is None
    assert group.compared == int(np.isfinite(scores).sum())


def test_a_comparison_comes_back_from_its_file():
    groups = {
        name: GroupComparison.of(random_verdicts(seed), random_verdicts(seed + 1))
        for seed, name in enumerate(["bolt", "nut"])
    }
    times = {"started_at": "2026-11-20T01:02:03+00:00", "finished_at": "2026-11-20T01:03:03+00:00"}
    comparison = Comparison(
        **{"before": "m@1", "after": "m@2", "images": "a/*", "alpha": 0.01, "groups": groups},
        **times | {"left_out": {"washer": 3}, "seconds": 60.0, "stages": {"score before": 1.0}},
    )
    content = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert Comparison.from_json(content) == comparison
    assert content["newly_flagged"] == sum(g.newly_flagged for g in groups.values())
    group, correlation = comparison.lowest_rank_correlation
    assert correlation == min(g.rank_correlation for g in groups.values())
    assert groups[group].rank_correlation == correlation
