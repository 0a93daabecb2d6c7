"""fit and score as functions, on S3 and on local disk, with Ray in this process."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import padim_ray
from padim_ray.artifact import open_version
from padim_ray.images import decode, model_input
from padim_ray.preprocessing import Preprocessing
from padim_ray.storage import Location
from tests.test_moments import assert_close

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"image_size": 64, "n_features": 40, "precision": "float32"}


@pytest.fixture(scope="module")
def fitted(archive, weights, s3, ray_cluster, tmp_path_factory):
    """The archive with some broken files in a bucket, fitted to a model in another."""
    broken = tmp_path_factory.mktemp("broken") / "archive"
    shutil.copytree(archive, broken)
    bolts = broken / "bolt"
    (bolts / "train/good/empty.png").write_bytes(b"")
    (bolts / "train/good/page.png").write_bytes(b"<html></html>")
    whole = (bolts / "test/good/000.png").read_bytes()
    (bolts / "test/good/cut short.png").write_bytes(whole[: len(whole) // 2])
    s3.upload("archive", broken)
    s3.upload("models")
    s3.upload("results")
    summary = padim_ray.fit(
        images="s3://archive/{group}/train/good/*",
        model="s3://models/parts",
        weights=weights,
        storage_options=s3.options,
        max_failed=2,
        **SMALL,
    )
    return summary


@pytest.fixture(scope="module")
def scored(fitted, s3):
    summary = padim_ray.score(
        images="s3://archive/{group}/test/{defect}/*",
        model="s3://models/parts",
        out="s3://results/run 1",
        storage_options=s3.options,
        heatmaps="all",
        maps=True,
        max_failed=0.01,
    )
    table = pq.read_table(s3.root / "results/run 1/results").sort_by("uri").to_pylist()
    return summary, table


def test_fit_counts_every_listed_image(fitted, s3):
    assert (fitted.listed, fitted.done, fitted.failed) == (41, 39, 2)
    assert fitted.within_max_failed
    assert fitted.failed_by_cause == {
        "decode: empty file": 1,
        "decode: not a PNG, JPEG, BMP, TIFF, WEBP image": 1,
    }
    version = open_version(Location.of("s3://models/parts", s3.options))
    assert {g: (e.images, e.failed) for g, e in version.groups.items()} == {
        "bolt": (24, 2),
        "nut": (15, 0),
    }
    manifest = pq.read_table(s3.root / "models/parts/versions/000001/manifest.parquet").to_pylist()
    assert len(manifest) == 41
    failed = {row["uri"]: row["error"] for row in manifest if row["status"] == "failed"}
    assert failed == {
        "s3://archive/bolt/train/good/empty.png": "decode: empty file",
        "s3://archive/bolt/train/good/page.png": "decode: not a PNG, JPEG, BMP, TIFF, WEBP image",
    }


def test_the_pipelines_moments_equal_the_librarys(fitted, archive, weights, s3):
    version = open_version(Location.of("s3://models/parts", s3.options))
    model = padim_ray.PadimModel(weights=weights, **SMALL)
    for group, suffix in (("bolt", "png"), ("nut", "jpg")):
        model.update(
            pixels(sorted((archive / group / "train/good").glob(f"*.{suffix}"))), group=group
        )
        assert_close(version.load_moments(group), model._merge(group), 1e-6)


def pixels(paths):
    inputs = [model_input(decode(path.read_bytes()), Preprocessing((64, 64))) for path in paths]
    return torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)


def test_every_listed_image_has_one_row(scored):
    summary, table = scored
    assert (summary.listed, summary.done, summary.failed) == (23, 22, 1)
    assert not summary.within_max_failed
    assert len({row["uri"] for row in table}) == len(table) == 23
    (failed,) = (row for row in table if row["status"] == "failed")
    assert failed["uri"].endswith("bolt/test/good/cut short.png")
    assert failed["error"].startswith("decode: broken image")
    assert failed["score"] is failed["heatmap_uri"] is failed["map_uri"] is failed["width"] is None
    row = next(row for row in table if row["status"] == "scored")
    assert (row["group"], row["defect"]) == ("bolt", "good")
    assert (row["width"], row["height"], row["model_version"]) == (64, 64, 1)
    assert row["scored_at"].tzinfo is not None


def test_the_pipelines_scores_equal_the_librarys(scored, archive, s3):
    model = padim_ray.PadimModel.load("s3://models/parts", s3.options)
    for row in scored[1]:
        if row["status"] == "scored":
            path = archive / row["uri"].removeprefix("s3://archive/")
            expected = model.score(pixels([path]), group=row["group"])
            assert row["score"] == pytest.approx(expected.scores.item(), rel=1e-4)
            stored = Image.open(s3.root / row["map_uri"].removeprefix("s3://"))
            np.testing.assert_allclose(np.asarray(stored), expected.maps[0], rtol=1e-3)


def test_defects_score_higher_than_good_images(scored):
    rows = [row for row in scored[1] if row["status"] == "scored"]
    for group in ("bolt", "nut"):
        labels = [row["defect"] != "good" for row in rows if row["group"] == group]
        scores = [row["score"] for row in rows if row["group"] == group]
        assert roc_auc_score(labels, scores) > 0.95


def test_heatmaps_are_named_after_their_images(scored, s3):
    for row in scored[1]:
        if row["status"] == "scored":
            relative = row["uri"].removeprefix("s3://archive/")
            assert row["heatmap_uri"] == f"s3://results/run 1/heatmaps/{relative}.png"
            heatmap = Image.open(s3.root / row["heatmap_uri"].removeprefix("s3://"))
            assert heatmap.size == (256, 256)


def test_the_run_is_described_and_nothing_else_is_left(scored, s3):
    out = s3.root / "results/run 1"
    assert {path.name for path in out.iterdir()} == {"results", "heatmaps", "maps", "run.json"}
    run = json.loads((out / "run.json").read_text())
    assert (run["listed"], run["scored"], run["failed"]) == (23, 22, 1)
    assert run["groups"] == {"bolt": 12, "nut": 11}
    assert run["model_version"] == 1
    assert run["heatmap_scale"][0] < run["heatmap_scale"][1]
    assert not any(value in (out / "run.json").read_text() for value in (s3.key, s3.secret))


def test_top_draws_only_the_highest_scores(fitted, s3, tmp_path):
    padim_ray.score(
        images="s3://archive/{group}/test/{defect}/*",
        model="s3://models/parts",
        out=str(tmp_path / "run"),
        storage_options=s3.options,
        heatmaps="top",
        top=3,
    )
    rows = pq.read_table(tmp_path / "run/results").sort_by([("score", "descending")]).to_pylist()
    assert [row["heatmap_uri"] is not None for row in rows] == [True] * 3 + [False] * 20
    drawn = {str(path) for path in (tmp_path / "run/heatmaps").rglob("*.png")}
    assert drawn == {row["heatmap_uri"] for row in rows[:3]}


def test_results_are_replaced_only_if_asked(fitted, archive, s3, tmp_path):
    options = {
        "images": f"{archive}/{{group}}/test/good/*",
        "model": str(s3.root / "models/parts"),
        "out": str(tmp_path / "run"),
        "heatmaps": "none",
    }
    padim_ray.score(**options)
    with pytest.raises(padim_ray.PadimError, match=r"already holds results.*--overwrite"):
        padim_ray.score(**options)
    padim_ray.score(**options | {"images": f"{archive}/{{group}}/test/spot/*", "overwrite": True})
    assert pq.read_table(tmp_path / "run/results").num_rows == 10
    assert not (tmp_path / "run/heatmaps").exists()


def test_too_many_failures_publish_nothing(fitted, weights, s3):
    summary = padim_ray.fit(
        images="s3://archive/{group}/train/good/*",
        model="s3://models/parts",
        weights=weights,
        storage_options=s3.options,
        max_failed=1,
        **SMALL,
    )
    assert not summary.within_max_failed
    assert summary.places == {"model": "not published"}
    assert open_version(Location.of("s3://models/parts", s3.options)).number == 1


def test_what_a_worker_can_not_read_is_a_sentence(archive, weights, tmp_path):
    model = padim_ray.PadimModel(weights=weights, **SMALL)
    model.update(pixels(sorted((archive / "nut/train/good").iterdir())), group="nut")
    model.save(str(tmp_path / "model"))
    (shard,) = (tmp_path / "model").rglob("gaussian-*")
    shard.write_bytes(b"damaged")
    with pytest.raises(padim_ray.ModelError) as error:
        padim_ray.score(
            images=f"{archive}/{{group}}/test/good/*.jpg",
            model=str(tmp_path / "model"),
            out=str(tmp_path / "out"),
        )
    assert str(error.value).startswith(f"{shard} can't be understood: ")
    assert "Traceback" not in str(error.value)


@pytest.fixture(scope="module")
def reference(archive, weights, tmp_path_factory):
    return fit_and_score(archive, weights, tmp_path_factory.mktemp("reference"))


def fit_and_score(archive, weights, directory, manifest=None, **options):
    images = {"manifest": manifest} if manifest else {"images": f"{archive}/{{group}}/train/good/*"}
    padim_ray.fit(**images, model=str(directory / "model"), weights=weights, **SMALL, **options)
    padim_ray.score(
        images=f"{archive}/{{group}}/test/{{defect}}/*",
        model=str(directory / "model"),
        out=str(directory / "out"),
        heatmaps="none",
        **{name: value for name, value in options.items() if name in ("actors", "batch_size")},
    )
    version = open_version(Location.of(str(directory / "model")))
    moments = {group: version.load_moments(group) for group in version.groups}
    rows = pq.read_table(directory / "out/results", columns=["uri", "score"]).to_pylist()
    return moments, {row["uri"]: row["score"] for row in rows}


@pytest.mark.parametrize("variant", ["actors", "batch_size", "order", "again"])
def test_how_the_work_is_divided_does_not_matter(
    variant, reference, archive, weights, tmp_path, monkeypatch
):
    options = {"actors": {"actors": 3}, "batch_size": {"batch_size": 5}}.get(variant, {})
    manifest = None
    if variant == "actors":  # so many shards that each group spans all actors
        monkeypatch.setattr("padim_ray.pipeline.decode.MIN_SHARD_IMAGES", 2)
    if variant == "order":
        manifest = shuffled_manifest(archive, tmp_path / "manifest.parquet")
    moments, scores = fit_and_score(archive, weights, tmp_path, manifest, **options)
    assert scores == pytest.approx(reference[1], rel=1e-4)
    for group, expected in reference[0].items():
        assert_close(moments[group], expected, 1e-6)
    if variant == "again":
        assert scores == reference[1]


def shuffled_manifest(archive, path):
    """The training images in another order, which other names bring about."""
    copies = path.parent / "copies"
    rows = []
    for number, image in enumerate(sorted(archive.glob("*/train/good/*"), reverse=True)):
        copy = copies / f"{number:03d}{image.suffix}"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(image.read_bytes())
        rows.append({"uri": str(copy), "group": image.parts[-4]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
