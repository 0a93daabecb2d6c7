import re
from xml.etree import ElementTree

import numpy as np
import pytest

from padim_ray.report.charts import (
    MAX_BARS,
    draw_score_histogram,
    draw_score_pairs,
    heat_colors,
)
from tests.report.run_directory import histogram


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter("text") if element.text]


def test_a_chart_takes_its_colours_from_the_page():
    svg = draw_score_histogram(histogram(), 10.0)
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    for name in ("--run", "--ink", "--muted", "--alarm"):
        assert f"var({name})" in svg


def test_charts_are_reproducible_and_share_no_ids():
    svg = draw_score_histogram(histogram(), 10.0)
    assert svg == draw_score_histogram(histogram(), 10.0)
    other = draw_score_histogram(histogram(1, defective=300), 20.0)
    ids = [set(re.findall(r'\bid="([^"]+)"', chart)) for chart in (svg, other)]
    assert not [name for name in ids[0] | ids[1] if re.fullmatch(r"[\w.]+_\d+", name)]
    assert "<style" not in svg


def test_text_stays_text():
    assert "score" in texts(draw_score_histogram(histogram(), 10.0))
    assert any("%" in text for text in texts(draw_score_histogram(histogram(), 10.0)))


@pytest.mark.parametrize("low", [1e-3, 5.0, 39.9])
@pytest.mark.parametrize("bins", [1, 7, 5000])
def test_any_edges_and_thresholds_can_be_drawn(low: float, bins: int):
    edges = np.geomspace(low, 40, bins + 1)
    counts = [0] * bins
    counts[-1] = 12
    content = {"edges": edges.tolist(), "scores": counts, "leave_one_out": [0] * bins}
    for threshold in (None, 0.0, 1e-4, 20.0, 1e4):
        assert len(draw_score_histogram(content, threshold)) < 40_000


def test_the_number_of_bars_is_bounded():
    wide = histogram()
    edges = np.geomspace(1e-3, 1e6, 20_001)
    scores = np.histogram(np.random.default_rng(0).lognormal(2, 0.5, 5000), edges)[0]
    wide |= {"edges": edges.tolist(), "scores": scores.tolist(), "leave_one_out": [0] * 20_000}
    svg = draw_score_histogram(wide, None)
    outline = max(re.findall(r' d="([^"]+)"', svg), key=len)
    assert MAX_BARS / 2 < len(re.findall("[ML]", outline)) / 2 <= MAX_BARS + 3


def test_without_scores_there_is_no_chart():
    empty = {"edges": [1, 2, 3], "scores": [0, 0], "leave_one_out": [0, 0]}
    assert draw_score_histogram(empty, 2.0) is None


@pytest.mark.parametrize("thresholds", [(20.0, 25.0), (None, 0.0)])
def test_pairs_of_scores_are_points_coloured_by_decision(thresholds):
    rng = np.random.default_rng(0)
    before, after = rng.uniform(5, 30, (2, 40))
    has_flipped = np.arange(40) < 7
    svg = draw_score_pairs(before, after, has_flipped, thresholds)
    points = re.findall(r"<use [^>]*fill: var\(--(run|alarm)\)", svg)
    assert (points.count("run"), points.count("alarm")) == (33, 7)
    assert svg.count("stroke-dasharray") == sum(map(bool, thresholds))
    assert {"score before", "score after"} <= set(texts(svg))


def test_without_images_there_are_no_pairs():
    nothing = np.empty(0)
    assert draw_score_pairs(nothing, nothing, nothing.astype(bool), (1.0, 1.0)) is None


def test_heat_has_the_colours_of_heatmaps():
    colors = heat_colors()
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    assert colors[-1] == "#fcffa4"
