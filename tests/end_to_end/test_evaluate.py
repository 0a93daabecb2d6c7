"""evaluate on labelled images with masks, compared with scikit-learn and plain loops."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import padim_ray

pytestmark = pytest.mark.usefixtures("ray_cluster")

SIZE = 96
GOOD, DEFECTIVE = 20, 8


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, draw_image):
    """Two groups: 40 images to train, good and `spot` ones to test, masks twice as large."""
    root = tmp_path_factory.mktemp("labelled")
    for shade, group in enumerate(("bolt", "nut")):

        def save(seed, path, shade=shade, defective=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_image(seed, size=SIZE, shade=shade, defective=defective).save(path)

        for index in range(40):
            save(1000 + index, root / group / f"train/good/{index:03d}.png")
        for index in range(GOOD):
            save(2000 + index, root / group / f"test/good/{index:03d}.png")
        for index in range(DEFECTIVE):
            save(3000 + index, root / group / f"test/spot/{index:03d}.png", defective=True)
            pair = [
                np.asarray(draw_image(3000 + index, size=SIZE, shade=shade, defective=defective))
                for defective in (False, True)
            ]
            mask = Image.fromarray((pair[0] != pair[1]).any(-1)).resize((2 * SIZE, 2 * SIZE), 0)
            path = root / group / f"ground_truth/spot/{index:03d}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
    truth = root / "bolt/ground_truth/spot"
    (truth / "005_mask.png").unlink()
    (truth / "006_mask.png").write_bytes(b"broken")
    Image.new("1", (10, 10)).save(truth / "007_mask.png")
    (root / "nut/test/good/019.png").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def bucket(labelled, s3):
    s3.upload("labelled", labelled)
    s3.upload("evaluations")
    return s3


@pytest.fixture(scope="module")
def model(bucket, weights, ray_cluster):
    padim_ray.fit(
        images="s3://labelled/{group}/train/good/*.png",
        model="s3://evaluations/model",
        weights=weights,
        image_size=64,
        n_features=40,
        precision="float32",
        storage_options=bucket.options,
    )
    return "s3://evaluations/model"


@pytest.fixture(scope="module")
def evaluated(bucket, model):
    """The summary, metrics.json, and the results with their maps and masks, of each group."""
    summary = padim_ray.evaluate(
        images="s3://labelled/{group}/test/{defect}/{name}.png",
        masks="s3://labelled/{group}/ground_truth/{defect}/{name}_mask.png",
        model=model,
        out="s3://evaluations/run 1",
        alpha=0.1,
        maps=True,
        storage_options=bucket.options,
    )
    out = bucket.root / "evaluations/run 1"
    return summary, json.loads((out / "metrics.json").read_text()), out


def test_image_metrics_are_scikit_learns(evaluated):
    _, metrics, out = evaluated
    table = pq.read_table(out / "results").to_pandas().query("status == 'scored'")
    for group, rows in table.groupby("group"):
        labels, scores = rows.defect == "spot", rows.score
        flagged = scores > rows.threshold
        expected = {
            "image_auroc": roc_auc_score(labels, scores),
            "image_aupr": average_precision_score(labels, scores),
            "image_f1": f1_score(labels, flagged),
            "false_alarm_rate": flagged[~labels].mean(),
            "miss_rate": (~flagged[labels]).mean(),
            "image_f1_best": max(f1_score(labels, scores >= t) for t in scores),
        }
        found = metrics["groups"][group]["metrics"]
        assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
        for name in expected:
            assert found[name]["low"] <= found[name]["high"]
    values = [
        metrics["groups"][group]["metrics"]["image_auroc"]["value"] for group in ("bolt", "nut")
    ]
    assert metrics["average"]["image_auroc"] == pytest.approx(np.mean(values))


def maps_and_masks(out, group, labelled):
    """The maps as written, and the masks at every third pixel."""
    maps, masks = [], []
    for row in pq.read_table(out / "results").to_pylist():
        if row["group"] != group or row["status"] == "failed":
            continue
        path = labelled / group / f"ground_truth/spot/{row['name']}_mask.png"
        mask = np.zeros((64, 64), bool)
        if row["defect"] == "spot":
            if not path.exists() or path.read_bytes() == b"broken":
                continue
            mask = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.NEAREST))
        masks.append(mask)
        maps.append(
            np.asarray(Image.open(out.parent.parent / row["map_uri"].removeprefix("s3://")))
        )
    return np.array(maps), np.array(masks)


@pytest.mark.parametrize("group", ["bolt", "nut"])
def test_pixel_metrics_equal_those_of_all_pixels_together(evaluated, labelled, group):
    _, metrics, out = evaluated
    maps, masks = maps_and_masks(out, group, labelled)
    assert len(maps) == {"bolt": GOOD + 6, "nut": GOOD - 1 + DEFECTIVE}[group]
    found = metrics["groups"][group]["metrics"]
    assert found["pixel_auroc"]["value"] == pytest.approx(
        roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-3
    )
    assert found["pixel_aupro"]["value"] == pytest.approx(plain_aupro(maps, masks), abs=1e-3)


def plain_aupro(maps, masks, limit=0.3):
    negatives = np.sort(maps[~masks])[::-1]
    regions = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(anomaly_map[labels == number]) for number in range(1, count + 1)]
    rates = np.linspace(0, limit, 3001)
    overlaps = [0.0]
    for rate in rates[1:]:
        threshold = negatives[int(rate * len(negatives))]
        overlaps.append(np.mean([(r >= threshold).mean() for r in regions]))
    return np.trapezoid(overlaps, rates) / limit


def test_unusable_masks_are_counted_and_named(evaluated):
    _, metrics, _ = evaluated
    bolt, nut = (metrics["groups"][group] for group in ("bolt", "nut"))
    assert bolt["pixels"] == {
        "masks": DEFECTIVE - 2,
        "empty_masks": 1,
        "missing_masks": 1,
        "unreadable_masks": 1,
    }
    assert nut["pixels"]["masks"] == DEFECTIVE and not nut["pixels"]["missing_masks"]
    assert (bolt["failed"], nut["failed"]) == (0, 1)
    assert (nut["normal"], nut["defective"]) == (GOOD - 1, DEFECTIVE)


def test_tables_pictures_and_report_are_written(evaluated):
    summary, metrics, out = evaluated
    table = pq.read_table(out / "metrics.parquet").to_pandas().set_index("group")
    row = table[(table.metric == "image_auroc") & table.defect.isna()].loc["nut"]
    assert row.value == metrics["groups"]["nut"]["metrics"]["image_auroc"]["value"]
    markdown = (out / "metrics.md").read_text()
    assert f"{metrics['average']['image_auroc']:.3f}" in markdown
    assert re.search(r"\| +bolt", markdown)
    assert Image.open(out / "curves/bolt.png").width == 1200
    assert "nut" in (out / "report.html").read_text()
    assert summary.places["metrics.md"] == "s3://evaluations/run 1/metrics.md"
    run = json.loads((out / "run.json").read_text())
    assert run["job"] == "evaluate" and run["flagged"] == summary.flagged
    # drift is measured on good images, so the defective third causes none
    drift = run["groups"]["nut"]["drift"]
    assert not drift["has_changed"] and drift["distance"] < drift["critical"] < 0.6


def test_a_manifest_may_bring_its_own_defects_and_masks(labelled, bucket, model, tmp_path, caplog):
    rows = [
        {
            "uri": str(path),
            "group": "nut",
            "defect": path.parent.name,
            "mask_uri": str(mask) if (mask := mask_of(path)).exists() else None,
        }
        for path in sorted((labelled / "nut/test").rglob("*.png"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")
    padim_ray.evaluate(
        manifest=str(tmp_path / "manifest.parquet"),
        model=str(bucket.root / "evaluations/model"),
        out=str(tmp_path / "out"),
        heatmaps="none",
    )
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    whole = json.loads((bucket.root / "evaluations/run 1/metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "pixel_aupro"):
        expected = whole["groups"]["nut"]["metrics"][name]["value"]
        assert metrics["groups"]["nut"]["metrics"][name]["value"] == pytest.approx(expected)


def mask_of(path: Path) -> Path:
    return path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"


def test_without_masks_there_are_image_metrics_only(labelled, bucket, model, tmp_path):
    padim_ray.evaluate(
        images=f"{labelled}/{{group}}/test/{{defect}}/*.png",
        model=str(bucket.root / "evaluations/model"),
        out=str(tmp_path / "out"),
        heatmaps="none",
    )
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["average"]
    assert metrics["image_auroc"] > 0.9
    assert metrics["pixel_auroc"] is metrics["pixel_aupro"] is None
