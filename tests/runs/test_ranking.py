import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.images.shards import shard_rows
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.runs.ranking import Scores
from padim_ray.scoring.decision import Decision

NOTHING = np.empty(0, np.float32)


@st.composite
def runs(draw):
    """Scores of up to five groups, some without a threshold, with failed images and ties."""
    groups = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True))
    counts = {group: draw(st.integers(1, 7)) for group in sorted(groups)}
    thresholds = {group: draw(st.sampled_from([None, 1.0, 3.0, 10.0])) for group in counts}
    names = [group for group, count in counts.items() for _ in range(count)]
    manifest = pa.table({"uri": [f"s3://b/{row}.png" for row in range(len(names))], "group": names})
    scores = Scores(
        manifest,
        shard_rows(manifest, draw(st.integers(1, 8))),
        {group: Decision(value, value, NOTHING) for group, value in thresholds.items()},
    )
    values = st.sampled_from([np.nan, 0.0, 0.5, 1.0, 3.0, 3.5, 11.0])
    drawn = draw(st.lists(values, min_size=len(names), max_size=len(names)))
    scores.values[:] = np.array(drawn, np.float32)
    return scores


def ranked(scores):
    """Rows with a score: those with a threshold first, by score / threshold, descending."""

    def key(row):
        threshold = scores.decisions[scores.manifest["group"][row].as_py()].threshold
        score = float(scores.values[row])
        return threshold is None, -score / (threshold or 1.0)

    return sorted(np.flatnonzero(~np.isnan(scores.values)).tolist(), key=key)


def options(**chosen):
    return ScoreOptions(images="a", model="m", out="o", **chosen)


@given(runs(), st.integers(0, 40))
def test_the_highest_images_are_those_of_a_plain_sort(scores, count):
    assert scores.highest(count).tolist() == ranked(scores)[:count]


@given(runs(), st.integers(0, 40))
def test_heatmaps_are_drawn_of_flagged_images_and_of_those_in_the_report(scores, count):
    thresholds = [
        scores.decisions[group].threshold for group in scores.manifest["group"].to_pylist()
    ]
    flagged = {
        row
        for row, threshold in enumerate(thresholds)
        if threshold is not None and scores.values[row] > threshold
    }
    wanted = scores.wanted(options(report_images=count)).tolist()
    assert wanted == sorted(flagged | set(ranked(scores)[:count]))


@given(runs(), st.integers(1, 40))
def test_heatmaps_of_the_top_or_of_all_images_are_drawn_of_scored_ones(scores, top):
    assert scores.wanted(options(heatmaps="top", top=top)).tolist() == sorted(ranked(scores)[:top])
    assert scores.wanted(options(heatmaps="all")).tolist() == sorted(ranked(scores))


@given(runs())
def test_groups_cover_the_rows_in_order(scores):
    groups, at = scores.manifest["group"].to_pylist(), 0
    for group, where, values, decision in scores.groups():
        assert where.start == at and set(groups[where]) == {group}
        np.testing.assert_array_equal(values, scores.values[where])
        assert decision is scores.decisions[group]
        at = where.stop
    assert at == len(groups)


@given(runs(), st.booleans(), st.data())
def test_tables_by_shard_are_those_of_a_loop_over_shards(scores, presigned, data):
    uris = scores.manifest["uri"].to_pylist()
    sources = [f"{uri}?signature=1" for uri in uris] if presigned else uris
    if presigned:
        scores.manifest = scores.manifest.append_column("fetch_uri", pa.array(sources))
    rows = sorted(data.draw(st.sets(st.integers(0, len(uris) - 1))))
    expected = []
    for number, shard in enumerate(scores.shards):
        here = [row for row in rows if shard.start <= row < shard.stop]
        if here:
            expected.append(
                {
                    "group": [scores.manifest["group"][row].as_py() for row in here],
                    "shard": [number] * len(here),
                    "row": [row - shard.start for row in here],
                    "source": [sources[row] for row in here],
                }
            )
    tables = scores.by_shard(np.array(rows, int))
    assert [table.to_pydict() for table in tables] == expected


@pytest.mark.parametrize("heatmaps", ["all", "top"])
def test_nothing_scored_gives_no_heatmaps(heatmaps):
    manifest = pa.table({"uri": ["a"], "group": ["g"]})
    scores = Scores(manifest, [slice(0, 1)], {"g": Decision(1.0, 1.0, NOTHING)})
    rows = scores.wanted(options(heatmaps=heatmaps))
    assert not len(rows) and scores.by_shard(rows) == []
