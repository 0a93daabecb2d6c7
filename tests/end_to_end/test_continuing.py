"""Jobs that were stopped are continued, and never mixed with other jobs."""

import json
import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import padim_ray
from padim_ray.errors import PadimError, TooManyFailed
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.densities.test_moments import assert_close

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
        if index % 5 == 4:
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
    summary = padim_ray.score(**job, out=str(out), max_failed=12)
    assert (summary.listed, summary.failed) == (60, 12)
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
    padim_ray.score(**job, overwrite=True)
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
    job = {"images": f"{incoming}/{{group}}/*", "out": str(tmp_path / "out")}
    padim_ray.score(**job, model=own)
    padim_ray.fit(**fitting, **SMALL, sigma=2)
    with pytest.raises(PadimError, match="with model version 1, which is 2 now"):
        padim_ray.score(**job, model=own)
    with pytest.raises(PadimError, match=rf"with model {own}, which is {model} now"):
        padim_ray.score(**job, model=model)


def test_images_that_could_not_be_fetched_are_tried_again(model, incoming, small_shards, tmp_path):
    job = {"images": f"{incoming}/{{group}}/*", "model": model, "out": str(tmp_path / "out")}
    secret = incoming / "bolt/000.png"
    content = secret.read_bytes()
    part, other = (tmp_path / f"out/results/part-00000{number}.parquet" for number in (0, 1))
    with pytest.raises(TooManyFailed):
        padim_ray.score(**job, max_failed=8)
    # as if the store had refused access: root may read any local file
    table = pq.read_table(part)
    denied = {"status": "failed", "error": "fetch: permission denied", "score": None}
    rows = [row | denied if row["uri"] == str(secret) else row for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)
    # as a task of a run that was overwritten would write it
    pq.write_table(pa.Table.from_pylist(rows[:1], table.schema.remove_metadata()), other)
    assert secret.read_bytes() == content
    summary = padim_ray.score(**job)
    assert rows_of(tmp_path / "out")[str(secret)]["status"] == "scored"
    assert (summary.listed, summary.failed) == (60, 12)


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
