"""A run's directory as an attacker writes it: its report shows the run's own files only."""

import base64
import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from padim_ray.cli import main
from padim_ray.errors import PadimError
from padim_ray.report import write_report
from padim_ray.storage.location import Location
from tests.report.run_directory import (
    draw_heat,
    draw_picture,
    group_summary,
    region,
    results_table,
    scored_row,
    write_metrics,
    write_part,
    write_run,
)


@pytest.fixture
def report(capsys):
    """A function: what `padim-ray report` says, and the page that it writes; None without one."""

    def report(root, *more):
        with pytest.raises(SystemExit) as exit:
            main(["report", str(root), *more])
        page = Path(root) / "report.html"
        assert exit.value.code == (0 if page.exists() else 2)
        return capsys.readouterr().err, page.read_text() if page.exists() else None

    return report


def pictures(page):
    """The number of pictures in a page."""
    return len(re.findall(r'src="data:image/', page))


def test_only_images_of_the_given_directory_are_shown(report, tmp_path):
    names = ["archive/{}/a.png", "secret/{}/b.png", "archive2/{}/c.png"]
    paths = [tmp_path / name.format("line7") for name in names]
    for path in paths:
        draw_picture(path)
    climbing = f"{tmp_path}/archive/../secret/line7/b.png"
    uris = [*map(str, paths), climbing, f"file://{paths[1]}", f"file://{paths[0]}"]
    write_part(tmp_path / "out", 0, [scored_row(uri, 20.0) for uri in uris])
    write_run(tmp_path / "out")
    _, page = report(tmp_path / "out")
    assert pictures(page) == 0
    assert page.count("not below a directory given with --images") == len(uris)
    for images in (f"{tmp_path}/archive", f"{tmp_path}/archive/{{line}}/*.png"):
        _, page = report(tmp_path / "out", "--images", images)
        assert pictures(page) == 2
    _, page = report(tmp_path / "out", "--images", str(tmp_path / "archive"), "--images", "/dev")
    assert pictures(page) == 2


def test_no_server_is_asked(report, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        uris = [f"{address}/a.png", f"{address}/archive/%2e%2e/b.png"]
        rows = [scored_row(uri, 20.0, heatmap_uri=uri) for uri in uris]
        write_part(tmp_path, 0, rows)
        write_run(tmp_path, images=address)
        _, page = report(tmp_path, "--images", f"{address}/archive")
        assert pictures(page) == 0
        with pytest.raises(TimeoutError):
            server.accept()


def test_heatmaps_are_files_of_the_run(report, tmp_path):
    out = tmp_path / "out"
    image = draw_picture(tmp_path / "secret.png")
    heatmaps = {name: draw_heat(out, name, image) for name in ("good", "link", "pipe", "huge")}
    for name in ("link", "pipe"):
        Path(heatmaps[name]).unlink()
    Path(heatmaps["link"]).symlink_to(tmp_path / "secret.png")
    os.mkfifo(heatmaps["pipe"])
    os.truncate(heatmaps["huge"], 10 * 2**30)
    uris = [*heatmaps.values(), str(tmp_path / "secret.png"), f"{out}/heatmaps/../../secret.png"]
    uris.append(f"file://{tmp_path}/secret.png")
    write_part(out, 0, [scored_row("/gone.png", 20.0, heatmap_uri=uri) for uri in uris])
    write_run(out)
    _, page = report(out)
    assert pictures(page) == 1
    for reason in ("a link that leads out of", "not a regular file", "it has 10737418240 bytes"):
        assert reason in page
    assert page.count("not below the run&#39;s directory") == 3


def test_curves_are_files_of_the_run(report, tmp_path):
    out = tmp_path / "out"
    draw_picture(tmp_path / "secret.png")
    write_part(out, 0, [])
    write_run(out)
    write_metrics(out, ["bolt"])
    _, page = report(out)
    assert pictures(page) == 1
    (out / "report.html").unlink()
    (out / "curves/bolt.png").unlink()
    (out / "curves/bolt.png").symlink_to(tmp_path / "secret.png")
    said, page = report(out)
    assert page is None and "a link that leads out of" in said


def group(**changes):
    return {"groups": {"bolt": group_summary() | changes}}


HISTOGRAM = group_summary()["histogram"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": []}, "it.groups must be an object"),
        ({"listed": "many"}, "it.listed must be a whole number"),
        ({"started_at": "yesterday"}, "it.started_at is no time"),
        ({"job": ["score"]}, "it.job can't be"),
        ({"failed_by_cause": {"x": None}}, "it.failed_by_cause.x must be"),
        (group(threshold="10"), "it.groups.bolt.threshold must be a finite number"),
        (group(drift={"distance": 1}), "'critical' is missing in it.groups.bolt.drift"),
        (group(histogram=HISTOGRAM | {"scores": [1]}), "one edge more than counts"),
        (group(histogram=HISTOGRAM | {"edges": [0] * 81}), "must ascend from above 0"),
        (group(heatmap_scale=[1]), "heatmap_scale must be a list of two"),
    ],
)
def test_a_summary_of_another_shape_is_a_sentence(tmp_path, changes, said):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text()) | changes
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(PadimError) as error:
        write_report(Location(str(tmp_path)))
    assert said in str(error.value) and f"{tmp_path}/run.json" in str(error.value)


@pytest.mark.parametrize("content", ["[1]", '"abc"', "{}", "{", "[" * 10**5, '{"a": NaN}'])
@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_a_file_of_other_json_is_a_sentence(tmp_path, name, content):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(PadimError, match=rf"/{name} can't be understood"):
        write_report(Location(str(tmp_path)))


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "results/part-000000.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_file_that_is_none_of_the_run_s_is_a_sentence(report, tmp_path, name, kind):
    out = tmp_path / "out"
    write_part(out, 0, [])
    write_run(out)
    write_metrics(out, ["bolt"])
    (out / name).rename(tmp_path / "away")
    (out / name).symlink_to(tmp_path / "away") if kind == "link" else os.mkfifo(out / name)
    said, page = report(out)
    assert page is None
    assert "a link that leads out of" in said or "not a regular file" in said


ROWS = results_table([scored_row("/a.png", 20.0, regions=[region(1, 1, 2, 2)])])


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("uri", pa.array([1])),
        ("uri", pa.array([None], pa.string())),
        ("group", pa.array([["bolt"]])),
        ("status", pa.array([True])),
        ("score", pa.array(["high"])),
        ("threshold", pa.array([{"a": 1}])),
        ("is_anomalous", pa.array(["yes"])),
        ("regions", pa.array(["everywhere"])),
        ("regions", pa.array([[{"x": 1}]])),
        ("heatmap_uri", pa.array([7])),
        ("width", pa.array(["wide"])),
    ],
)
def test_a_part_of_other_columns_is_a_sentence(tmp_path, name, column):
    table = ROWS.set_column(ROWS.column_names.index(name), name, column)
    (tmp_path / "results").mkdir()
    pq.write_table(table, tmp_path / "results/part-000000.parquet")
    write_run(tmp_path)
    with pytest.raises(PadimError, match=r"part-000000\.parquet.*not a results file"):
        write_report(Location(str(tmp_path)))


def test_regions_with_missing_numbers_are_left_out(tmp_path):
    regions = [region(1, 1, 2, 2), None, region(1, 1, 2, 2) | {"peak": None}]
    write_part(tmp_path, 0, [scored_row("/a.png", 20.0, regions=regions)])
    write_run(tmp_path)
    assert "1 region" in write_report(Location(str(tmp_path))).read().decode()


def test_a_small_part_that_expands_is_refused(tmp_path):
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4000, np.int32)), ["a" * 10**6])
    table = pa.table({"uri": long, "group": ["g"] * 4000, "status": ["scored"] * 4000})
    (tmp_path / "results").mkdir()
    path = tmp_path / "results/part-000000.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=False)
    write_run(tmp_path)
    with pytest.raises(PadimError, match="its columns have more than"):
        write_report(Location(str(tmp_path)))


def test_the_job_s_own_report_shows_the_images_that_it_scored(tmp_path):
    draw_picture(tmp_path / "archive/a.png")
    write_part(tmp_path / "out", 0, [scored_row(str(tmp_path / "archive/a.png"), 20.0)])
    write_run(tmp_path / "out")
    page = write_report(Location(str(tmp_path / "out"))).read()
    assert pictures(page.decode()) == 1
    assert base64.b64encode(b"RIFF")[:4] in page  # WebP
