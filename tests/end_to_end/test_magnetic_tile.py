"""Accuracy on real images with real ImageNet weights, through an S3 server."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import padim_ray
from tests.end_to_end.test_evaluate import plain_aupro

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data/magnetic_tile"
SOLAR_CELLS = SHARED / "data/elpv"
WEIGHTS = SHARED / "weights/resnet18_imagenet_trunk.pth"

PAPER = {"regularization": "paper", "stride": 4, "neighbourhood": 1, "score_share": 0}

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(
        not (DATA.is_dir() and WEIGHTS.is_file()),
        reason=f"the magnetic-tile images and ImageNet weights are not at {SHARED}",
    ),
]


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    source = tmp_path_factory.mktemp("tile")
    for split in ("train", "test", "ground_truth"):
        shutil.copytree(DATA / split, source / "tile" / split)
    shutil.copy(WEIGHTS, source / "trunk.pth")
    s3.upload("factory", source)
    yield s3
    shutil.rmtree(s3.root / "factory")


def fit_and_evaluate(s3, name, *, maps=False, **options):
    """Fit and evaluate through S3, and remove the model; the group's metrics, and the results.

    The metrics have besides `stored`: bytes of the group's largest kind of files.
    """
    padim_ray.fit(
        images="s3://factory/tile/train/good/*.jpg",
        model=f"s3://factory/{name}",
        weights="s3://factory/trunk.pth",
        storage_options=s3.options,
        **options,
    )
    padim_ray.evaluate(
        images="s3://factory/tile/test/{defect}/{name}.jpg",
        masks="s3://factory/tile/ground_truth/{defect}/{name}_mask.png",
        model=f"s3://factory/{name}",
        out=f"s3://factory/{name}-results",
        storage_options=s3.options,
        alpha=0.05,
        maps=maps,
        heatmaps="anomalous" if maps else "none",
    )
    out = s3.root / f"factory/{name}-results"
    group = json.loads((out / "metrics.json").read_text())["groups"]["default"]
    table = pq.read_table(out / "results").to_pandas()
    assert len(table) == group["images"] == 583
    sizes = Counter()
    for path in (s3.root / f"factory/{name}").rglob("groups/default/*.safetensors"):
        sizes[path.name.partition("-")[0]] += path.stat().st_size
    assert set(sizes) == {"moments", "gaussian"}
    shutil.rmtree(s3.root / f"factory/{name}")
    metrics = {metric: figure["value"] for metric, figure in group["metrics"].items()}
    return metrics | {"stored": max(sizes.values())}, table


def auroc(s3, name, **options):
    metrics, table = fit_and_evaluate(s3, name, calibration_images=0, **options)
    assert metrics["image_auroc"] == pytest.approx(
        roc_auc_score(table.defect != "good", table.score)
    )
    return metrics["image_auroc"]


@pytest.fixture(scope="module")
def defaults(bucket):
    return fit_and_evaluate(bucket, "float32", precision="float32", maps=True)


def test_all_channels_with_shrinkage(bucket, defaults):
    full, _ = defaults
    half, _ = fit_and_evaluate(bucket, "bfloat16", calibration_images=0, precision="bfloat16")
    for name, least in (("image_auroc", 0.975), ("pixel_auroc", 0.8), ("pixel_aupro", 0.745)):
        print(f"\n{name}, defaults: float32 {full[name]:.4f}, bfloat16 {half[name]:.4f}")
        assert min(full[name], half[name]) >= least
        assert abs(full[name] - half[name]) <= 0.003
    assert full["stored"] <= 110e6


def test_good_images_alone_give_a_threshold_that_holds(defaults):
    """Without a defective image, 5 % of good ones may be flagged."""
    metrics, _ = defaults
    print(
        f"\nat alpha 0.05: {metrics['false_alarm_rate']:.3f} of good images flagged, "
        f"{1 - metrics['miss_rate']:.3f} of defective ones"
    )
    assert 0.005 <= metrics["false_alarm_rate"] <= 0.09
    assert metrics["miss_rate"] <= 0.25


def test_pixel_metrics_equal_those_of_all_pixels_together(bucket, defaults):
    metrics, table = defaults
    maps, masks = [], []
    for row in table.itertuples():
        maps.append(np.asarray(Image.open(bucket.root / row.map_uri.removeprefix("s3://"))))
        path = DATA / f"ground_truth/{row.defect}/{row.name}_mask.png"
        mask = Image.open(path).resize((256, 256), 0) if path.exists() else np.zeros((256, 256))
        masks.append(np.asarray(mask, bool))
    maps, masks = np.array(maps), np.array(masks)
    exact = roc_auc_score(masks.ravel(), maps.ravel()), plain_aupro(maps, masks)
    print(
        f"\npixel AUROC {metrics['pixel_auroc']:.5f} (all pixels at once: {exact[0]:.5f}), "
        f"AUPRO {metrics['pixel_aupro']:.5f} ({exact[1]:.5f})"
    )
    assert metrics["pixel_auroc"] == pytest.approx(exact[0], abs=1e-3)
    assert metrics["pixel_aupro"] == pytest.approx(exact[1], abs=1e-3)


def test_all_channels_with_the_papers_regularisation(bucket):
    value = auroc(bucket, "paper", **PAPER)
    print(f"\nimage AUROC, paper, all channels: {value:.4f}")
    assert value >= 0.945


def test_a_hundred_channels_with_the_papers_regularisation(bucket):
    full = auroc(bucket, "full", n_features=100, precision="float32", **PAPER)
    half = auroc(bucket, "half", n_features=100, precision="bfloat16", **PAPER)
    print(f"\nimage AUROC, paper, 100 channels: float32 {full:.4f}, bfloat16 {half:.4f}")
    assert min(full, half) >= 0.91
    assert abs(full - half) <= 0.003


@pytest.mark.skipif(not SOLAR_CELLS.is_dir(), reason=f"the solar cells are not at {SOLAR_CELLS}")
def test_solar_cells(tmp_path):
    padim_ray.fit(
        images=f"{SOLAR_CELLS}/train/good/*",
        model=str(tmp_path / "model"),
        weights=str(WEIGHTS),
        calibration_images=0,
    )
    padim_ray.score(
        images=f"{SOLAR_CELLS}/test/{{defect}}/*",
        model=str(tmp_path / "model"),
        out=str(tmp_path / "out"),
        heatmaps="none",
    )
    table = pq.read_table(tmp_path / "out/results").to_pandas()
    value = roc_auc_score(table.defect != "good", table.score)
    print(f"\nsolar cells, image AUROC, defaults: {value:.4f}")
    assert value >= 0.935
