"""The content of an evaluation, and its JSON, Parquet and Markdown."""

import html
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.evaluation.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    PixelCounts,
    bootstrap,
    image_metrics,
    pixel_metrics,
)
from padim_ray.evaluation.tables import (
    METRICS,
    GroupOutcome,
    MaskCounts,
    evaluate,
    to_markdown,
    to_table,
)


def outcome(seed=0, threshold=1.5):
    """Twenty good images, ten cracked ones and five bent ones, which have no masks."""
    rng = np.random.default_rng(seed)
    defects = ["good"] * 20 + ["crack"] * 10 + ["bent"] * 5
    scores = rng.normal(1, 0.3, 35) + np.repeat([0, 0.6, 0.3], [20, 10, 5])
    maps = rng.gamma(4, size=(30, 12, 12))
    masks = np.zeros(maps.shape, bool)
    masks[20:, 3:6, 4:9] = True
    maps = (maps + 3 * masks).astype(np.float32)
    pixels = {
        "good": PixelCounts.of(maps[:20], masks[:20]),
        "crack": PixelCounts.of(maps[20:], masks[20:]),
    }
    masks = MaskCounts(masks=10, missing_masks=5)
    return GroupOutcome(scores.astype(np.float32), defects, threshold, pixels, masks, failed=2)


def nothing():
    return GroupOutcome(np.array([], np.float32), [])


def test_the_layout_is_the_documented_one():
    evaluation = evaluate({"tile": outcome()}, "good")
    assert list(evaluation) == ["normal", "aupro_limit", "average", "groups"]
    assert (evaluation["normal"], evaluation["aupro_limit"]) == ("good", 0.3)
    group = evaluation["groups"]["tile"]
    metrics = group.pop("metrics")
    defects = group.pop("defects")
    assert group == {
        "images": 35,
        "normal": 20,
        "defective": 15,
        "failed": 2,
        "threshold": 1.5,
        "pixels": {"masks": 10, "empty_masks": 0, "missing_masks": 5, "unreadable_masks": 0},
    }
    assert {name: part["images"] for name, part in defects.items()} == {"bent": 5, "crack": 10}
    for figures in (metrics, *(part["metrics"] for part in defects.values())):
        assert tuple(figures) == METRICS
        for metric in IMAGE_METRICS:
            assert figures[metric].keys() == {"value", "low", "high"}
        for metric in PIXEL_METRICS:
            assert figures[metric].keys() == {"value"}


def test_a_group_is_measured_on_all_its_images_and_pixels():
    group = outcome()
    metrics = evaluate({"tile": group}, "good", seed=3)["groups"]["tile"]["metrics"]
    images = group.scores, np.arange(35) >= 20, 1.5
    values = image_metrics(*images)
    for metric, (low, high) in bootstrap(*images, seed=3).items():
        assert metrics[metric] == {"value": values[metric], "low": low, "high": high}
    for metric, value in pixel_metrics(group.pixels["good"] + group.pixels["crack"]).items():
        assert metrics[metric] == {"value": value}


def test_a_defect_is_compared_with_all_normal_images():
    group = outcome()
    defects = evaluate({"tile": group}, "good")["groups"]["tile"]["defects"]
    bent = np.r_[0:20, 30:35]
    expected = image_metrics(group.scores[bent], np.arange(25) >= 20, 1.5)
    measured = {metric: defects["bent"]["metrics"][metric]["value"] for metric in IMAGE_METRICS}
    assert measured == expected
    assert defects["bent"]["metrics"]["pixel_aupro"] == {"value": None}  # it has no masks
    assert defects["crack"]["metrics"]["pixel_aupro"]["value"] > 0


def test_averages_weigh_groups_alike_and_skip_undefined_values():
    outcomes = {"a": outcome(1), "b": outcome(2, threshold=None), "c": nothing()}
    evaluation = evaluate(outcomes, "good")
    values = [evaluation["groups"][group]["metrics"] for group in "ab"]
    average = evaluation["average"]
    for metric in ("image_auroc", "pixel_aupro"):
        expected = (values[0][metric]["value"] + values[1][metric]["value"]) / 2
        assert average[metric] == pytest.approx(expected)
    assert average["miss_rate"] == values[0]["miss_rate"]["value"]
    assert set(evaluate({"c": nothing()}, "good")["average"].values()) == {None}


@pytest.mark.parametrize("normal", ["good", "crack", "of no image"])
def test_json_holds_no_nan(normal):
    evaluation = evaluate({"a": outcome(threshold=None), "b": nothing()}, normal)
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def test_the_table_has_a_row_for_every_figure():
    evaluation = evaluate({"a": outcome(), "b": nothing()}, "good")
    table = to_table(evaluation)
    assert len(table) == (3 + 1) * len(METRICS)
    assert table.schema.types == [pa.string()] * 3 + [pa.float64()] * 3 + [pa.int64()]
    rows = {(row["group"], row["defect"], row["metric"]): row for row in table.to_pylist()}
    whole = evaluation["groups"]["a"]["metrics"]["image_auroc"]
    row = rows["a", None, "image_auroc"]
    assert (row["value"], row["low"], row["high"], row["images"]) == (*whole.values(), 35)
    assert rows["a", "crack", "pixel_auroc"]["images"] == 10
    assert rows["a", "crack", "pixel_auroc"]["low"] is None
    assert rows["b", None, "image_auroc"]["value"] is None


def test_markdown_puts_metrics_in_rows_and_groups_in_columns():
    evaluation = evaluate({"a": outcome(1), "b": outcome(2)}, "good")
    lines = to_markdown(evaluation).splitlines()
    assert cells(lines[2]) == ["", "Avg", "a", "b"]
    figures = [evaluation["average"]["image_auroc"]]
    figures += [evaluation["groups"][group]["metrics"]["image_auroc"]["value"] for group in "ab"]
    assert cells(lines[4]) == ["Image AUROC", *(f"{figure:.3f}" for figure in figures)]
    assert [line for line in lines if line.startswith("| crack")]
    assert "## What the figures mean" in lines


def test_markdown_marks_undefined_values():
    markdown = to_markdown(evaluate({"a": nothing()}, "good"))
    assert "None" not in markdown and "nan" not in markdown
    assert cells(markdown.splitlines()[4]) == ["Image AUROC", "–", "–"]


EVALUATION = evaluate({"x": outcome()}, "good")
NASTY = "a|b `c`\n# d <script>alert(1)</script> ![x](http://e.org) __f__ *g* &amp; \\|"


def named(name):
    """Lines of the Markdown of an evaluation whose group and defect have this name."""
    group = EVALUATION["groups"]["x"]
    group = {**group, "defects": {name: group["defects"]["crack"]}}
    return to_markdown({**EVALUATION, "groups": {name: group}}).split("\n")


@given(st.just(NASTY) | st.text(min_size=1))
def test_names_cannot_break_out_of_markdown(name):
    lines = named(name)
    for line, harmless in zip(lines, named("x"), strict=True):
        assert re.findall(r"[<>`*|!\[\]\\/:]|__", line) == re.findall(r"[<>`*|:]", harmless)
    assert html.unescape(named(NASTY)[2]).count(" ".join(NASTY.split())) == 1


def test_ordinary_names_stay_as_they_are():
    markdown = to_markdown(evaluate({"metal_nut 2-b": outcome()}, "good"))
    assert "| metal_nut 2-b |" in markdown


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
