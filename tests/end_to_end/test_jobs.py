"""fit and score as functions, on S3 and on local disk, with Ray in this process."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import padim_ray
from padim_ray.images.decode import decode
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import model_input
from padim_ray.model.spec import new_spec
from padim_ray.model.version import open_version
from padim_ray.pipeline.jobs import calibrate
from padim_ray.planning.batches import embedding_bytes
from padim_ray.runs.options.model import ModelOptions
from padim_ray.scoring.regions import PEAK_SHARE
from padim_ray.storage.location import Location
from tests.densities.test_moments import assert_close

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
    )
    table = pq.read_table(s3.root / "results/run 1/results").sort_by("uri").to_pylist()
    return summary, table


def test_fit_counts_every_listed_image(fitted, s3):
    assert (fitted.listed, fitted.done, fitted.failed) == (41, 39, 2)
    assert fitted.failed_by_cause == {
        "decode: empty file": 1,
        "decode: not a PNG, JPEG, BMP, TIFF, WEBP image": 1,
    }
    version = open_version(Location.of("s3://models/parts", s3.options))
    assert {g: (e.images, e.failed) for g, e in version.groups.items()} == {
        "bolt": (24, 2),
        "nut": (15, 0),
    }
    (file,) = (s3.root / "models/parts/versions/000001").glob("manifest-*.parquet")
    manifest = pq.read_table(file).to_pylist()
    assert len(manifest) == 41
    failed = {row["uri"]: row["error"] for row in manifest if row["status"] == "failed"}
    assert {row["uri"] for row in manifest if row["leave_one_out_score"] is None} == set(failed)
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
        assert_close(version.load_statistics(group), model._merge(group), 1e-6)


def test_the_pipelines_calibration_equals_the_librarys(fitted, archive, weights, s3):
    version = open_version(Location.of("s3://models/parts", s3.options))
    model = padim_ray.PadimModel(weights=weights, **SMALL)
    for group, suffix in (("bolt", "png"), ("nut", "jpg")):
        images = pixels(sorted((archive / group / "train/good").glob(f"*.{suffix}")))
        model.update(images, group=group)
        model.calibrate(images, group=group)
        stored, expected = version.load_calibration(group), model.calibration(group)
        np.testing.assert_allclose(stored.scores, expected.scores, rtol=1e-4)
        assert stored.pixels.sum() == expected.pixels.sum() == len(images) * 64 * 64
        for alpha in (0.01, 0.1):
            expected_threshold = expected.pixel_threshold(alpha)
            assert stored.pixel_threshold(alpha) == pytest.approx(expected_threshold, rel=2e-3)


def test_a_calibration_with_a_sample_is_reproducible(archive, weights, tmp_path):
    scores = []
    for name in ("first", "again"):
        padim_ray.fit(
            images=f"{archive}/{{group}}/train/good/*",
            model=str(tmp_path / name),
            weights=weights,
            calibration_images=10,
            **SMALL,
        )
        version = open_version(Location.of(str(tmp_path / name)))
        assert [entry.calibrated for entry in version.groups.values()] == [10, 10]
        scores.append(version.load_manifest()["leave_one_out_score"].to_pylist())
    assert scores[0] == scores[1]
    assert sum(score is not None for score in scores[0]) == 20


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_embeddings_give_the_calibration_of_a_second_pass(
    archive, weights, tmp_path, precision
):
    """No group's embeddings fit the memory, the first one's, all; all of a group, or a sample."""
    options = SMALL | {"precision": precision}
    spec, _ = new_spec(ModelOptions(weights=weights, **options), precision)
    one = embedding_bytes(spec)
    for images in (11, 2000):
        found = {}
        for memory in (0, 25 * one, 2**30):
            model = tmp_path / f"{memory} {images}"
            padim_ray.fit(
                images=f"{archive}/{{group}}/train/good/*",
                model=str(model),
                weights=weights,
                calibration_images=images,
                embedding_memory=memory,
                **options,
            )
            version = open_version(Location.of(str(model)))
            manifest = version.load_manifest()
            assert sum(entry.calibrated for entry in version.groups.values()) == min(39, 2 * images)
            found[memory] = (
                manifest["leave_one_out_score"].to_numpy(),
                *(version.load_calibration(group).pixels for group in version.groups),
            )
        read_again, *bins = found[0]
        for scores, *pixels in (found[25 * one], found[2**30]):
            np.testing.assert_allclose(scores, read_again, rtol=1e-3)
            assert abs(np.subtract(pixels, bins)).sum() <= 2e-3 * np.sum(bins)


def test_lost_embeddings_are_computed_again(archive, weights, tmp_path, monkeypatch, caplog):
    @ray.remote(num_cpus=0)
    class Owner:
        def put(self):
            return [ray.put("embeddings")]

    def lose(group, kept, *rest):
        """References to what was lost with the process that owned it."""
        owner = Owner.remote()
        lost = ray.get(owner.put.remote())
        ray.kill(owner)
        with pytest.raises(ray.exceptions.RayActorError):
            while True:
                ray.get(owner.put.remote())
        return lost

    monkeypatch.setattr(calibrate, "start_measuring", lose)
    with caplog.at_level("WARNING", "padim_ray"):
        padim_ray.fit(
            images=f"{archive}/{{group}}/train/good/*",
            model=str(tmp_path / "model"),
            weights=weights,
            **SMALL,
        )
    assert "Embeddings are lost" in caplog.text
    groups = open_version(Location.of(str(tmp_path / "model"))).groups
    assert {group: entry.calibrated for group, entry in groups.items()} == {"bolt": 24, "nut": 15}


def pixels(paths):
    images = [decode(path.read_bytes(), max_pixels=64 * 64) for path in paths]
    inputs = [model_input(image, Preprocessing((64, 64))) for image in images]
    return torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)


def test_every_listed_image_has_one_row(scored):
    summary, table = scored
    assert (summary.listed, summary.done, summary.failed) == (23, 22, 1)
    assert len({row["uri"] for row in table}) == len(table) == 23
    (failed,) = (row for row in table if row["status"] == "failed")
    assert failed["uri"].endswith("bolt/test/good/cut short.png")
    assert failed["error"].startswith("decode: broken image")
    nothing = ("score", "p_value", "threshold", "is_anomalous", "regions", "map_uri", "width")
    assert [failed[name] for name in nothing] == [None] * len(nothing)
    assert failed["heatmap_uri"] is None
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


def test_thresholds_and_p_values_follow_from_each_groups_calibration(scored, s3):
    version = open_version(Location.of("s3://models/parts", s3.options))
    for row in scored[1]:
        if row["status"] == "failed":
            continue
        calibration = version.load_calibration(row["group"])
        # 24 and 15 training images can't reach the default alpha of 0.01
        assert row["threshold"] == calibration.scores[-1]
        below = (calibration.scores < np.float32(row["score"])).sum()
        count = len(calibration.scores)
        assert row["p_value"] == pytest.approx((1 + count - below) / (count + 1))
        assert row["is_anomalous"] == (row["score"] > row["threshold"])
        assert bool(row["regions"]) == row["is_anomalous"]
        if row["is_anomalous"]:
            anomaly_map = np.asarray(Image.open(s3.root / row["map_uri"].removeprefix("s3://")))
            pixel_threshold = min(calibration.pixel_threshold(0.001), row["threshold"])
            if anomaly_map.max() < pixel_threshold:
                pixel_threshold = PEAK_SHARE * anomaly_map.max()
            inside = np.zeros((64, 64), bool)
            for region in row["regions"]:
                x, y = region["x"], region["y"]
                box = anomaly_map[y : y + region["height"], x : x + region["width"]]
                assert box.max() == pytest.approx(region["peak"], rel=1e-3)
                inside[y : y + region["height"], x : x + region["width"]] = True
            assert row["regions"][0]["peak"] == pytest.approx(anomaly_map.max(), rel=1e-3)
            assert not (anomaly_map[~inside] >= pixel_threshold * 1.001).any()
            area = sum(region["area"] for region in row["regions"])
            assert area == pytest.approx((anomaly_map >= pixel_threshold).sum(), rel=0.05)


def test_defects_are_called_anomalous_and_good_images_are_not(scored):
    rows = [row for row in scored[1] if row["status"] == "scored"]
    flagged = {
        kind: [r["is_anomalous"] for r in rows if r["defect"] == kind] for kind in ("good", "spot")
    }
    assert np.mean(flagged["spot"]) > 0.8
    assert np.mean(flagged["good"]) < 0.2


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


def test_run_json_describes_the_run_and_no_other_file_is_left(scored, s3):
    out = s3.root / "results/run 1"
    assert {path.name for path in out.iterdir()} == {
        *("results", "heatmaps", "maps"),
        *("run.json", "report.html", "job.json", "listed.parquet", "_SUCCESS", ".claims"),
    }
    run = json.loads((out / "run.json").read_text())
    assert (run["listed"], run["scored"], run["failed"]) == (23, 22, 1)
    assert run["flagged"] == sum(row["is_anomalous"] is True for row in scored[1])
    bolt, nut = run["groups"]["bolt"], run["groups"]["nut"]
    assert [bolt[name] for name in ("listed", "scored", "failed")] == [12, 11, 1]
    assert [nut[name] for name in ("listed", "scored", "failed")] == [11, 11, 0]
    assert bolt["flagged"] + nut["flagged"] == run["flagged"]
    assert "15 training images can't give" in nut["threshold_note"]
    assert sum(nut["histogram"]["scores"]) == 11
    assert sum(nut["histogram"]["leave_one_out"]) == 15
    assert bolt["drift"] is None  # eleven images are too few
    assert run["model_version"] == 1
    assert bolt["heatmap_scale"][0] < bolt["threshold"] < bolt["heatmap_scale"][1]
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
    rows = pq.read_table(tmp_path / "run/results").to_pylist()
    rows.sort(key=lambda row: -row["score"] / row["threshold"] if row["score"] else 0)
    assert [row["heatmap_uri"] is not None for row in rows] == [True] * 3 + [False] * 20
    drawn = {str(path) for path in (tmp_path / "run/heatmaps").rglob("*.png")}
    assert drawn == {row["heatmap_uri"] for row in rows[:3]}


@pytest.mark.parametrize("report_images", [0, 12])
def test_anomalous_images_and_those_in_the_report_have_a_heatmap(
    fitted, s3, tmp_path, report_images
):
    summary = padim_ray.score(
        images="s3://archive/{group}/test/{defect}/*",
        model="s3://models/parts",
        out=str(tmp_path / "run"),
        storage_options=s3.options,
        alpha=0.2,
        report_images=report_images,
    )
    rows = pq.read_table(tmp_path / "run/results").to_pylist()
    assert all(row["heatmap_uri"] for row in rows if row["is_anomalous"])
    drawn = sum(row["heatmap_uri"] is not None for row in rows)
    assert drawn == max(summary.flagged, report_images)


def test_a_given_threshold_judges_all_groups(fitted, s3, tmp_path):
    summary = padim_ray.score(
        images="s3://archive/{group}/test/spot/*",
        model="s3://models/parts",
        out=str(tmp_path / "run"),
        storage_options=s3.options,
        threshold=0.001,
        min_region_area=10**9,
        heatmaps="none",
    )
    rows = pq.read_table(tmp_path / "run/results").to_pylist()
    assert summary.flagged == len(rows) == 10
    assert {row["threshold"] for row in rows} == {np.float32(0.001)}
    assert {len(row["regions"]) for row in rows} == {0}
    assert all(row["p_value"] is not None for row in rows)


def test_a_model_without_calibration_scores_and_warns(archive, weights, tmp_path):
    images = f"{archive}/{{group}}/test/good/*"
    model = {"model": str(tmp_path / "m")}
    padim_ray.fit(images=images, weights=weights, calibration_images=0, **model, **SMALL)
    summary = padim_ray.score(images=images, out=str(tmp_path / "run"), **model)
    rows = pq.read_table(tmp_path / "run/results").to_pylist()
    assert {row["threshold"] for row in rows} == {row["p_value"] for row in rows} == {None}
    assert {row["is_anomalous"] for row in rows} == {None}
    assert "nothing is called anomalous" in summary.verdicts["bolt"].threshold_note
    assert (tmp_path / "run/report.html").exists()


def test_a_file_that_workers_can_not_read_is_reported_in_one_sentence(archive, weights, tmp_path):
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
    moments = {group: version.load_statistics(group) for group in version.groups}
    rows = pq.read_table(directory / "out/results", columns=["uri", "score"]).to_pylist()
    return moments, {row["uri"]: row["score"] for row in rows}


@pytest.mark.parametrize("variant", ["actors", "batch_size", "order", "again"])
def test_results_do_not_depend_on_how_the_work_is_divided(
    variant, reference, archive, weights, tmp_path, monkeypatch
):
    options = {"actors": {"actors": 3}, "batch_size": {"batch_size": 5}}.get(variant, {})
    manifest = None
    if variant == "actors":  # enough shards for every actor to work on each group
        monkeypatch.setattr("padim_ray.planning.batches.MIN_SHARD_IMAGES", 2)
    if variant == "order":
        manifest = shuffled_manifest(archive, tmp_path / "manifest.parquet")
    moments, scores = fit_and_score(archive, weights, tmp_path, manifest, **options)
    assert scores == pytest.approx(reference[1], rel=1e-4)
    for group, expected in reference[0].items():
        assert_close(moments[group], expected, 1e-6)
    if variant == "again":
        assert scores == reference[1]


def shuffled_manifest(archive, path):
    """The training images under other names, which change their order."""
    copies = path.parent / "copies"
    rows = []
    for number, image in enumerate(sorted(archive.glob("*/train/good/*"), reverse=True)):
        copy = copies / f"{number:03d}{image.suffix}"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(image.read_bytes())
        rows.append({"uri": str(copy), "group": image.parts[-4]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
