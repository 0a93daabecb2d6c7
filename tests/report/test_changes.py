"""The page of a comparison: its text, and in a browser."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from padim_ray.evaluation.agreement import Comparison, GroupComparison, Verdicts
from padim_ray.report.changes import write_changes
from padim_ray.scoring.decision import Decision
from padim_ray.storage.location import Location
from tests.report.run_directory import draw_heat, draw_picture

NAMES = ["bolt", "<script>alert(1)</script>"]


def judge(scores, threshold):
    decision = Decision(threshold, threshold, np.empty(0, np.float32))
    return Verdicts(np.asarray(scores, np.float32), decision)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """A function that writes the page of a comparison, with pictures of the first images."""

    def write(groups, shown=6, left_out=()):
        root = tmp_path_factory.mktemp("comparison")
        rows = []
        for index in range(shown):
            name = f"{index:02d} & co.png"
            path = root / "images" / name
            image = draw_picture(path, seed=index)
            group = NAMES[index % len(groups)]
            before, after = groups[group]
            row = {"uri": str(path), "group": group, "line": f"<b>{index}</b>", "size": 9}
            for side, verdicts in (("before", before), ("after", after)):
                score = float(verdicts.scores[index])
                row |= {
                    f"score_{side}": score,
                    f"threshold_{side}": verdicts.threshold,
                    f"is_anomalous_{side}": bool(score > verdicts.threshold),
                    f"p_value_{side}": 0.5,
                }
                if index != 1:
                    seed = index + 100 * (side == "after")
                    row[f"heatmap_{side}"] = draw_heat(root, f"{side} {name}", image, seed)
            row["change"] = row["score_after"] / row["score_before"]
            rows.append(row)
        comparison = Comparison(
            before="s3://models/line7@3",
            after="s3://models/line7@4",
            images="s3://archive/{group}/*.png",
            alpha=0.01,
            started_at="2026-11-20T01:02:03+00:00",
            finished_at="2026-11-20T01:12:03+00:00",
            groups={group: GroupComparison.of(*both) for group, both in groups.items()},
            left_out=dict(left_out),
            seconds=600.0,
            stages={},
        )
        write_changes(Location.of(str(root / "report.html")), comparison, groups, rows)
        return root

    return write


@pytest.fixture(scope="module")
def two_groups(page_of):
    rng = np.random.default_rng(0)
    scores = rng.uniform(5, 30, 700)
    return page_of(
        {
            NAMES[0]: (judge(scores, 20.0), judge(scores * rng.uniform(0.8, 1.3, 700), 20.0)),
            NAMES[1]: (judge(scores, 20.0), judge(scores[::-1], 25.0)),
        },
        left_out=[("washer", 17)],
    )


def text_of(root: Path) -> str:
    return re.sub(r"\s+", " ", (root / "report.html").read_text())


def test_models_that_agree_make_the_same_decisions(page_of):
    scores = np.linspace(5, 30, 50)
    html = text_of(page_of({"bolt": (judge(scores, 20.0), judge(scores, 20.0))}, shown=0))
    assert "Both models make the same decisions" in html and "Rank correlation 1.0000" in html
    assert "No image to show" in html


def test_changes_are_counted(two_groups):
    html = text_of(two_groups)
    assert re.search(r"[\d,]+ decisions changed, \d+ % of 1,400 images", html)
    assert "washer (17)" in html and "Images rank differently" in html
    assert "s3://models/line7@3" in html and "s3://models/line7@4" in html
    assert "<script>alert" not in html and "<b>0</b>" not in html


def test_charts_hold_a_bounded_number_of_points(two_groups):
    charts = re.findall(r'<div class="chart".*?</svg>', text_of(two_groups))
    assert len(charts) == 2
    for chart in charts:
        points = chart.count("<use ")
        assert 500 < points <= 550  # the ticks of the axes are points too


def test_both_heatmaps_are_side_by_side(two_groups, open_page):
    page = open_page(two_groups)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    cards = page.locator(".card:visible")
    expect(cards).to_have_count(6)
    first = cards.first
    expect(first.locator(".frame")).to_have_count(3)
    boxes = [frame.bounding_box() for frame in first.locator(".frame").all()]
    assert len({round(box["y"]) for box in boxes}) == 1  # in one row
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    expect(cards.nth(1).locator(".missing")).to_have_text(["No heatmap was drawn"] * 2)
    # the same control fades both to the original
    page.locator(".toolbar").get_by_role("checkbox", name="heat").uncheck()
    opacities = first.locator(".heat").evaluate_all(
        "heats => heats.map(heat => getComputedStyle(heat).opacity)"
    )
    assert opacities == ["0", "0"]
    page.locator(".toolbar").get_by_role("combobox", name="group").select_option(index=1)
    expect(cards).to_have_count(3)
    cards.first.locator(".open").click()
    expect(page.get_by_role("dialog").locator(".frame")).to_have_count(3)
    page.keyboard.press("Escape")
