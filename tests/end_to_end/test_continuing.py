"""Jobs that were stopped are continued, and never mixed with other jobs."""

import io
import json
import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import padim_ray
from padim_ray.errors import NoImages, PadimError, TooManyFailed
from padim_ray.model.history import prune
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.densities.test_moments import assert_close
from tests.helpers.web import serve_files

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"image_size": 64, "n_features": 20, "precision": "float32"}


@pytest.fixture(scope="module")
def model(archive, weights, tmp_path_factory, ray_cluster):
    place = str(tmp_path_factory.mktemp("models") / "m")
    padim_ray.fit(images=f"{archive}/{{group}}/train/good/*", model=place, weights=weights, **SMALL)
    return place


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("padim_ray.planning.batches.MIN_SHARD_IMAGES", 2)


@pytest.fixture
def incoming(archive, draw_image, tmp_path):
    """Images to score, some of them broken."""
    for index in range(60):
        path = tmp_path / f"new/{'bolt' if index < 36 else 'nut'}/{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % 6 == 5:
            path.write_bytes(b"broken")
        else:
            draw_image(index).save(path)
    return tmp_path / "new"


def rows_of(out):
    rows = pq.read_table(out / "results").to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return {row["uri"]: row for row in rows}


def modified(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "results").glob("part-*")}


def settled(out):
    """When each part was written, read after the last tasks of the stopped job have ended."""
    before = None
    while before != (before := modified(out)):
        time.sleep(3)
    return before


@pytest.mark.parametrize("heatmaps", ["none", "all"])
def test_a_stopped_run_is_continued_without_scoring_anything_twice(
    model, incoming, small_shards, tmp_path, heatmaps
):
    job = {"images": f"{incoming}/{{group}}/*", "model": model, "heatmaps": heatmaps}
    padim_ray.score(**job, out=str(tmp_path / "undisturbed"))
    out = tmp_path / "out"
    for most in (0, 2):
        with pytest.raises(TooManyFailed, match=f"more than --max-failed {most}"):
            padim_ray.score(**job, out=str(out), max_failed=most)
        assert not (out / "run.json").exists() and not (out / "_SUCCESS").exists()
    before = settled(out)
    assert 0 < len(before) < 30
    (incoming / "bolt/999.png").write_bytes(b"arrived later")  # was not listed
    summary = padim_ray.score(**job, out=str(out), max_failed=10)
    assert (summary.listed, summary.failed) == (60, 10)
    assert summary.before == 2 * len(before)
    if heatmaps == "none":
        assert before.items() <= modified(out).items()
    expected, rows = rows_of(tmp_path / "undisturbed"), rows_of(out)
    assert rows.keys() == expected.keys()
    for uri, row in rows.items():
        for name in ("status", "error", "group", "p_value", "is_anomalous", "width"):
            assert row[name] == expected[uri][name]
        if row["status"] == "scored":
            assert row["score"] == pytest.approx(expected[uri]["score"], rel=1e-4)
        assert (row["heatmap_uri"] is None) == (expected[uri]["heatmap_uri"] is None)
    runs = [
        json.loads((place / "run.json").read_text()) for place in (tmp_path / "undisturbed", out)
    ]
    for name in ("listed", "scored", "failed", "flagged", "failed_by_cause"):
        assert runs[0][name] == runs[1][name]


def test_a_complete_run_is_left_alone(model, incoming, tmp_path):
    job = {"images": f"{incoming}/{{group}}/*", "model": model, "out": str(tmp_path / "out")}
    first = padim_ray.score(**job)
    before = modified(tmp_path / "out")
    again = padim_ray.score(**job)
    assert modified(tmp_path / "out") == before
    assert (again.listed, again.failed, again.flagged, again.before) == (
        *(first.listed, first.failed, first.flagged),
        first.listed,
    )
    (incoming / "bolt/000.png").unlink()
    (incoming / "nut/new.png").write_bytes(b"")
    with pytest.raises(
        PadimError, match=r"other images: since then 1 image added \(.*new.png\), 1 "
    ):
        padim_ray.score(**job)
    padim_ray.score(**job, overwrite=True, max_failed=11)
    assert f"{incoming}/nut/new.png" in rows_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"alpha": 0.2}, r"with --alpha 0.01, which is 0.2 now"),
        ({"threshold": 3.0}, r"with --threshold not given, which is 3.0 now"),
        ({"heatmaps": "none"}, r"with --heatmaps anomalous, which is none now"),
        ({"max_image_pixels": 10}, r"with --max-image-pixels 100000000, which is 10 now"),
        (
            {"images": "/elsewhere/*"},
            r"with --images .*/new/\{group\}/\*, which is /elsewhere/\* now",
        ),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_another_run_is_refused_with_the_difference(
    model, incoming, small_shards, tmp_path, changed, difference, is_complete
):
    job = {"images": f"{incoming}/{{group}}/*", "model": model, "out": str(tmp_path / "out")}
    if is_complete:
        padim_ray.score(**job)
    else:
        with pytest.raises(TooManyFailed):
            padim_ray.score(**job, max_failed=0)
    with pytest.raises(PadimError, match=difference) as error:
        padim_ray.score(**job | changed)
    assert "--overwrite" in str(error.value)


def test_another_model_is_refused(model, archive, incoming, weights, tmp_path):
    own = str(tmp_path / "m")
    fitting = {"images": f"{archive}/{{group}}/train/good/*", "model": own, "weights": weights}
    padim_ray.fit(**fitting, **SMALL)
    job = {"images": f"{incoming}/{{group}}/*", "out": str(tmp_path / "out"), "max_failed": 10}
    padim_ray.score(**job, model=own)
    padim_ray.fit(**fitting, **SMALL, sigma=2)
    with pytest.raises(PadimError, match="with model version 1, which is 2 now"):
        padim_ray.score(**job, model=f"{own}@2")
    with pytest.raises(PadimError, match=rf"with model {own}, which is {model} now"):
        padim_ray.score(**job, model=model)


def test_a_run_keeps_the_version_that_it_began_with(
    archive, incoming, weights, small_shards, tmp_path, caplog
):
    own, out = str(tmp_path / "m"), tmp_path / "out"
    fitting = {"images": f"{archive}/{{group}}/train/good/*", "model": own, "weights": weights}
    padim_ray.fit(**fitting, **SMALL)
    job = {"images": f"{incoming}/{{group}}/*", "model": own, "out": str(out), "heatmaps": "none"}
    with pytest.raises(TooManyFailed):
        padim_ray.score(**job, max_failed=4)
    committed = settled(out)
    assert committed
    padim_ray.fit(**fitting, **SMALL, sigma=2)
    caplog.set_level(logging.INFO, "padim_ray")
    padim_ray.score(**job, max_failed=10)
    assert f"The current version of {own} is 2; the run stays with version 1" in caplog.text
    assert {row["model_version"] for row in rows_of(out).values()} == {1}
    assert committed.items() <= modified(out).items()
    prune(Location.of(own), keep=1)
    assert padim_ray.score(**job).before == 60  # complete, whatever became of the model
    with pytest.raises(PadimError, match=f"{own} has no version 1; it has 2"):
        padim_ray.score(**job, retry_failed=["decode"])
    assert (out / "_SUCCESS").exists()
    padim_ray.score(**job, max_failed=10, overwrite=True)
    assert {row["model_version"] for row in rows_of(out).values()} == {2}


def test_a_comparison_keeps_the_versions_that_it_began_with(
    model, archive, weights, incoming, tmp_path
):
    own = str(tmp_path / "m")
    fitting = {"images": f"{archive}/{{group}}/train/good/*", "model": own, "weights": weights}
    padim_ray.fit(**fitting, **SMALL, sigma=1)
    job = {"images": f"{incoming}/{{group}}/*", "out": str(tmp_path / "out")}
    with pytest.raises(TooManyFailed):
        padim_ray.compare(model, own, **job, max_failed=0)
    padim_ray.fit(**fitting, **SMALL, sigma=2)
    for _ in range(2):
        assert padim_ray.compare(model, own, **job, max_failed=10).after == f"{own}@1"
    with pytest.raises(PadimError, match=f"with models {model}@1 {own}@1, which is .*@2 now"):
        padim_ray.compare(model, f"{own}@2", **job, max_failed=10)


@pytest.fixture
def http(tmp_path):
    with serve_files(tmp_path / "web") as server:
        yield server


@pytest.fixture
def upload(http, archive, tmp_path):
    """Upload a folder of each group; return a manifest and all images' paths on the server."""

    def upload(folder, name="images"):
        rows = []
        for path in sorted(archive.glob(f"*/{folder}/*")):
            relative = path.relative_to(archive)
            rows.append({"uri": http.put(f"/{relative}", path.read_bytes())})
            rows[-1]["group"] = relative.parts[0]
        manifest = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), manifest)
        return str(manifest), [row["uri"].removeprefix(f"http://{http.address}") for row in rows]

    return upload


def test_images_that_could_not_be_fetched_are_unfinished_work(
    model, http, upload, small_shards, tmp_path, caplog
):
    manifest, paths = upload("test/good")
    out = tmp_path / "out"
    job = {"manifest": manifest, "model": model, "out": str(out)}
    padim_ray.score(**job | {"out": str(tmp_path / "undisturbed")})
    refused = [paths[3], paths[8]]
    http.refused = dict.fromkeys(refused, 403)
    for _ in range(2):
        with pytest.raises(TooManyFailed, match=r"2 of 12 images \(fetch: permission denied: 2\)"):
            padim_ray.score(**job)
        assert not (out / "_SUCCESS").exists()
        assert json.loads((out / "run.json").read_text())["is_complete"] is False
        assert "Repeat its command" in (out / "report.html").read_text()
        failed = {uri for uri, row in rows_of(out).items() if row["status"] == "failed"}
        assert failed == {f"http://{http.address}{path}" for path in refused}
    before = rows_of(out)
    del http.refused[refused[0]]
    summary = padim_ray.score(**job, max_failed=1)
    assert (summary.failed, summary.before) == (1, 8)  # two shards of two were tried again
    assert (out / "_SUCCESS").exists()
    assert json.loads((out / "run.json").read_text())["is_complete"] is True
    kept = [row["scored_at"] == before[uri]["scored_at"] for uri, row in rows_of(out).items()]
    assert sum(kept) == 8
    assert padim_ray.score(**job).before == 12  # allowed then, so complete
    http.refused.clear()
    caplog.set_level(logging.INFO, "padim_ray")
    assert padim_ray.score(**job, retry_failed=["decode"]).before == 12
    assert padim_ray.score(**job, retry_failed=["fetch: permission"]).failed == 0
    expected, found = rows_of(tmp_path / "undisturbed"), rows_of(out)
    for uri, row in expected.items():
        assert found[uri]["score"] == pytest.approx(row["score"], rel=1e-5)
        assert found[uri]["is_anomalous"] == row["is_anomalous"]
        assert (found[uri]["heatmap_uri"] is None) == (row["heatmap_uri"] is None)


def assert_same_models(before, after):
    """Check that the current versions of two models are the same but for rounding."""
    versions = [open_version(Location.of(str(root))) for root in (before, after)]
    columns = ["uri", "group", "status", "error"]
    tables = [version.load_manifest().select(columns) for version in versions]
    assert tables[0].equals(tables[1])
    assert versions[0].groups == versions[1].groups
    for group in versions[0].groups:
        assert_close(versions[1].load_statistics(group), versions[0].load_statistics(group), 1e-6)


@pytest.mark.parametrize("round_images", [4, 20_000])
def test_a_fit_waits_for_images_that_could_not_be_fetched(
    http, upload, weights, tmp_path, round_images
):
    manifest, paths = upload("train/good")
    http.put(paths[5], b"broken")
    job = {"manifest": manifest, "weights": weights, "round_images": round_images, **SMALL}
    padim_ray.fit(**job, model=str(tmp_path / "undisturbed"))
    model = tmp_path / "m"
    http.refused = dict.fromkeys([paths[0], paths[7], *paths[-4:]], 403)
    with pytest.raises(TooManyFailed, match=r"6 of 39 images .* could not be fetched"):
        padim_ray.fit(**job, model=str(model))
    assert not (model / "CURRENT").exists()
    asked = http.requests
    for path in (paths[7], *paths[-4:]):
        del http.refused[path]
    with pytest.raises(TooManyFailed, match=r"1 of 39 images .* could not be fetched"):
        padim_ray.fit(**job, model=str(model))
    assert set(http.requests - asked) == {paths[0], paths[7], *paths[-4:]}  # no others
    http.refused.clear()
    summary = padim_ray.fit(**job, model=str(model))
    assert (summary.listed, summary.failed) == (39, 1)
    assert_same_models(tmp_path / "undisturbed", model)


def test_an_update_waits_for_images_that_could_not_be_fetched(http, upload, weights, tmp_path):
    base, _ = upload("train/good", "base")
    manifest, paths = upload("test/good")
    for name in ("undisturbed", "m"):
        padim_ray.fit(manifest=base, model=str(tmp_path / name), weights=weights, **SMALL)
    padim_ray.update(manifest=manifest, model=str(tmp_path / "undisturbed"))
    job = {"manifest": manifest, "model": str(tmp_path / "m"), "round_images": 4}
    http.refused = dict.fromkeys([paths[0], *paths[6:]], 403)  # all of the second group
    with pytest.raises(TooManyFailed, match="7 of 12 images"):
        padim_ray.update(**job)
    assert open_version(Location.of(job["model"])).number == 1
    http.refused.clear()
    padim_ray.update(**job)
    assert_same_models(tmp_path / "undisturbed", tmp_path / "m")


def test_a_calibration_waits_for_images_that_could_not_be_fetched(http, upload, weights, tmp_path):
    manifest, paths = upload("train/good")
    job = {"manifest": manifest, "weights": weights, "embedding_memory": 0, **SMALL}
    padim_ray.fit(**job, model=str(tmp_path / "undisturbed"))
    http.asked.clear()
    http.served_once = {paths[3], paths[30]}
    with pytest.raises(TooManyFailed, match=r"2 of 39 images .* could not be fetched"):
        padim_ray.fit(**job, model=str(tmp_path / "m"))
    assert not (tmp_path / "m/CURRENT").exists()
    http.served_once = set()
    summary = padim_ray.fit(**job, model=str(tmp_path / "m"))
    assert (summary.before, summary.calibrated) == (39, 39)
    assert_same_models(tmp_path / "undisturbed", tmp_path / "m")


def test_an_evaluation_waits_for_masks_that_could_not_be_fetched(model, http, upload, tmp_path):
    manifest, _ = upload("test/spot")
    good, _ = upload("test/good", "good")
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "PNG")
    rows = pq.read_table(manifest).to_pylist()
    masks = [f"/masks/{number}.png" for number in range(len(rows))]
    for row, path in zip(rows, masks, strict=True):
        row |= {"defect": "spot", "mask_uri": http.put(path, mask.getvalue())}
    rows += [row | {"defect": "good"} for row in pq.read_table(good).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    job = {"manifest": manifest, "model": model, "out": str(tmp_path / "out")}
    http.refused[masks[2]] = 403
    with pytest.raises(TooManyFailed, match="1 mask could not be fetched"):
        padim_ray.evaluate(**job)
    http.refused.clear()
    assert padim_ray.evaluate(**job).failed == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    counts = json.dumps(metrics)
    assert '"unreadable_masks": 1' not in counts and '"masks": 5' in counts


def test_an_empty_day_is_a_run_of_no_images(model, tmp_path, capsys):
    job = {"images": f"{tmp_path}/new/{{group}}/*", "model": model, "out": str(tmp_path / "out")}
    (tmp_path / "new").mkdir()
    with pytest.raises(NoImages, match=f"No group matched: nothing in {tmp_path}/new"):
        padim_ray.score(**job)
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        summary = padim_ray.score(**job, allow_empty=True)
        assert (summary.listed, summary.failed, summary.flagged) == (0, 0, 0)
        assert (tmp_path / "out/_SUCCESS").exists()
    assert "There were no images to score." in (tmp_path / "out/report.html").read_text()
    assert json.loads((tmp_path / "out/run.json").read_text())["listed"] == 0


def test_a_part_of_an_overwritten_run_is_scored_again(model, incoming, small_shards, tmp_path):
    job = {"images": f"{incoming}/{{group}}/*", "model": model, "out": str(tmp_path / "out")}
    with pytest.raises(TooManyFailed):
        padim_ray.score(**job, max_failed=4)
    settled(tmp_path / "out")
    part = tmp_path / "out/results/part-000000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 1).replace_schema_metadata(), part)
    assert padim_ray.score(**job).listed == 60
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 60 and set(table["uri"].to_pylist()) <= set(rows)


def test_a_stopped_fit_is_continued(archive, weights, tmp_path, caplog):
    broken = archive.parent / "broken-archive"
    if not broken.exists():
        for index, path in enumerate(sorted(archive.glob("*/train/good/*"))):
            copy = broken / path.relative_to(archive)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"broken" if index in (3, 20, 30) else path.read_bytes())
    job = {"images": f"{broken}/{{group}}/train/good/*", "weights": weights, **SMALL}
    padim_ray.fit(**job, model=str(tmp_path / "undisturbed"))
    model = tmp_path / "stopped"
    for most in (0, 1, 2):
        with pytest.raises(TooManyFailed):
            padim_ray.fit(**job, model=str(model), max_failed=most, round_images=4)
        with pytest.raises(padim_ray.ModelError, match="There is no model"):
            open_version(Location.of(str(model)))
    with pytest.raises(PadimError, match=r"an unfinished fit with --sigma 4\.0, which is 2 now"):
        padim_ray.fit(**job | {"sigma": 2}, model=str(model))
    rounds = sorted(path.name for path in (model / "versions/000001/rounds").glob("*.json"))
    assert len(rounds) > 3
    caplog.set_level(logging.INFO, "padim_ray")
    summary = padim_ray.fit(**job, model=str(model), max_failed=3, round_images=4)
    assert (summary.listed, summary.failed) == (39, 3) and 0 < summary.before < 39
    assert "of 39 images are done already" in caplog.text
    assert not (model / "versions/000001/rounds").exists()
    versions = [
        open_version(Location.of(str(tmp_path / name))) for name in ("undisturbed", "stopped")
    ]
    manifests = [version.load_manifest() for version in versions]
    assert (
        manifests[0]
        .drop_columns("leave_one_out_score")
        .equals(manifests[1].drop_columns("leave_one_out_score"))
    )
    for group, entry in versions[0].groups.items():
        assert entry == versions[1].groups[group]
        assert_close(versions[1].load_statistics(group), versions[0].load_statistics(group), 1e-6)


def test_a_fit_is_not_repeated_unless_asked(archive, weights, tmp_path):
    job = {
        "images": f"{archive}/{{group}}/train/good/*",
        "model": str(tmp_path / "m"),
        "weights": weights,
        **SMALL,
    }
    assert padim_ray.fit(**job).before == 0
    again = padim_ray.fit(**job)
    assert (again.listed, again.before) == (39, 39)
    assert open_version(Location.of(job["model"])).number == 1
    padim_ray.fit(**job, overwrite=True)
    assert open_version(Location.of(job["model"])).number == 2
    padim_ray.fit(**job | {"sigma": 2})
    assert open_version(Location.of(job["model"])).number == 3
