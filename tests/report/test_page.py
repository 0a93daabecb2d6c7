import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.report import write_report
from padim_ray.report.page import MAX_BYTES, MAX_CHARTS, MAX_FAILED, MAX_GROUPS
from padim_ray.storage.location import Location
from tests.report.run_directory import (
    draw_picture,
    failed_row,
    group_summary,
    noisy_picture,
    region,
    scored_row,
    write_metrics,
    write_part,
    write_run,
)


def report(root: Path, **arguments) -> str:
    return Path(write_report(Location.of(str(root)), **arguments).uri).read_text()


def cards(html: str) -> list[str]:
    return re.findall(r'<li class="card".*?</li>', html, flags=re.S)


def plain(html: str) -> str:
    """Text without tags, on one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_directory_without_a_run_is_reported_in_a_sentence(tmp_path):
    with pytest.raises(PadimError, match=r"no finished run .there is no run\.json"):
        write_report(Location.of(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_broken_summary_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PadimError, match=r"run\.json can't be understood"):
        write_report(Location.of(str(tmp_path)))


def test_the_page_lies_beside_the_results_on_disk_and_on_s3(place: Location, tmp_path):
    draw_picture(tmp_path / "a.png")
    name = write_part(tmp_path / "out", 0, [scored_row(str(tmp_path / "a.png"), 20.0)])
    write_run(tmp_path / "out")
    for file in (f"results/{name}", "run.json"):
        (place / file).write((tmp_path / "out" / file).read_bytes())
    written = write_report(place, parts=[name])
    assert written.uri == f"{place.uri}/report.html"
    assert written.read().startswith(b"<!doctype html>")
    assert written.read() == write_report(place).read()  # the same every time


def test_the_page_says_what_ran(tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    text = plain(report(tmp_path))
    for part in (
        "padim-ray score · 2026-11-20 05:12 UTC",
        "s3://archive/{group}/2026-11-20/{defect}/*.png",
        "s3://models/line7 , version 3",
        "in 35 min 38 s",
        "No image to show",
    ):
        assert part in text


def test_the_page_holds_as_many_images_as_wanted(tmp_path):
    write_part(tmp_path, 0, [scored_row(f"/gone/{index}.png", index) for index in range(40)])
    write_run(tmp_path)
    assert len(cards(report(tmp_path, images=7))) == 7
    assert len(cards(report(tmp_path, images=0))) == 0
    assert len(cards(report(tmp_path))) == 40


@pytest.mark.slow
def test_many_large_noisy_images_stay_within_the_limit(tmp_path):
    rows = []
    for index in range(200):
        path = tmp_path / f"images/{index % 4}.png"
        if not path.exists():
            noisy_picture(path, side=480, seed=index)
        boxes = [region(x, x, 50, 50, x) for x in range(100)]
        row = scored_row(str(path), 20.0 + index, width=480, height=480, regions=boxes)
        rows.append({**row, "heatmap_uri": str(path)})
    write_part(tmp_path, 0, rows)
    write_run(tmp_path)
    html = report(tmp_path)
    assert len(html.encode()) < MAX_BYTES
    assert html.count('<img class="thumbnail"') == html.count('<img class="heat"') == 200


def test_long_texts_stay_within_the_limit(tmp_path):
    rows = [scored_row(f"/gone/{index}.png", index, note="é" * 300_000) for index in range(30)]
    failures = [failed_row(f"/gone/{index}.png", "x" * 200_000) for index in range(30)]
    write_part(tmp_path, 0, rows + failures)
    write_run(tmp_path)
    html = report(tmp_path)
    assert len(html.encode()) < MAX_BYTES
    assert 0 < len(cards(html)) < 30


def test_the_most_noteworthy_of_thousands_of_groups_are_drawn(tmp_path):
    groups = {f"group {index}": group_summary(flagged=index % 100) for index in range(2000)}
    write_part(tmp_path, 0, [])
    write_run(tmp_path, groups)
    html = report(tmp_path)
    assert html.count('<div class="chart"') == MAX_CHARTS
    drawn = re.findall(r'<h3 class="name">(group \d+)</h3>', html)
    assert all(name.endswith("99") for name in drawn)
    left_out = 2000 - MAX_CHARTS - MAX_GROUPS
    assert f"{left_out:,} groups with less to report are only in run.json" in plain(html)
    assert html.count('<th scope="row" class="name">group ') == MAX_GROUPS


def test_failed_images_are_listed_and_all_are_counted(tmp_path):
    count = MAX_FAILED + 50
    write_part(tmp_path, 0, [failed_row(f"/images/{index:04d}.png") for index in range(count)])
    groups = {"bolt": group_summary(0, listed=count, failed=count, histogram=None, drift=None)}
    write_run(tmp_path, groups)
    text = plain(report(tmp_path))
    assert f"decode: empty file {count}" in text
    assert f"{MAX_FAILED} of {count} failed images" in text
    assert "/images/0199.png" in text and "/images/0200.png" not in text
    assert "No image was scored" in text


def test_an_evaluation_shows_metrics_and_curves(tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path, {"bolt/m8": group_summary(), "nut": group_summary()}, job="evaluate")
    write_metrics(tmp_path, ["bolt/m8", "nut"])
    (tmp_path / "curves/nut.png").unlink()
    html = report(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["groups"]["bolt/m8"]["metrics"]
    assert f"{metrics['image_auroc']['value']:.3f}" in plain(html)
    assert "average of groups" in html and "scratch" in html
    assert html.count('<figure class="curves">') == 1
    assert 'href="curves/bolt%252Fm8.png"' in html


def test_large_curves_are_only_linked(tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    write_metrics(tmp_path, ["bolt"])
    noisy_picture(tmp_path / "curves/bolt.png")
    html = report(tmp_path)
    assert 'href="curves/bolt.png"' in html and "data:image/png" not in html


def test_a_page_without_thresholds_ranks_by_score(tmp_path):
    write_part(tmp_path, 0, [scored_row("/a.png", 3, None), scored_row("/b.png", 7, None)])
    write_run(tmp_path, {"bolt": group_summary(2, threshold=None, pixel_threshold=None)})
    html = report(tmp_path)
    assert ["b.png" in card for card in cards(html)] == [True, False]
    assert "score ÷ threshold" not in html and "no threshold" in html


def test_the_page_allows_nothing_but_its_own_content(tmp_path):
    draw_picture(tmp_path / "a.png")
    write_part(tmp_path, 0, [scored_row(str(tmp_path / "a.png"), 20.0)])
    write_run(tmp_path)
    html = report(tmp_path)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r'(?:src|href)="(?!data:|#|heatmaps/|curves/)', html)
    assert len(re.findall("<script", html)) == 1


def test_reports_need_neither_ray_nor_torch(tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    program = (
        "import sys; from padim_ray.report import write_report; "
        "from padim_ray.storage.location import Location; write_report(Location.of(sys.argv[1])); "
        "sys.exit(bool({'ray', 'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_a_group_may_have_an_empty_name(tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path, {"": group_summary()})
    write_metrics(tmp_path, [""])
    assert 'href="curves/%25.png"' in report(tmp_path)
    assert Image.open(tmp_path / "curves/%.png").size == (900, 300)
