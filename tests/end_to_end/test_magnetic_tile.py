"""Accuracy on real images with real ImageNet weights, through an S3 server."""

import json
import shutil
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
WEIGHTS = SHARED / "weights/resnet18_imagenet_trunk.pth"

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
    """Fit and evaluate through S3, and remove the model; the group's metrics, and the results."""
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
    shutil.rmtree(s3.root / f"factory/{name}")
    return {metric: figure["value"] for metric, figure in group["metrics"].items()}, table


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
    full = defaults[0]["image_auroc"]
    half = auroc(bucket, "bfloat16", precision="bfloat16")
    print(f"\nimage AUROC, defaults: float32 {full:.4f}, bfloat16 {half:.4f}")
    assert min(full, half) >= 0.965
    assert abs(full - half) <= 0.003


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
    value = auroc(bucket, "paper", regularization="paper")
    print(f"\nimage AUROC, paper, all channels: {value:.4f}")
    assert value >= 0.945


def test_a_hundred_channels_with_the_papers_regularisation(bucket):
    full = auroc(bucket, "full", regularization="paper", n_features=100, precision="float32")
    half = auroc(bucket, "half", regularization="paper", n_features=100, precision="bfloat16")
    print(f"\nimage AUROC, paper, 100 channels: float32 {full:.4f}, bfloat16 {half:.4f}")
    assert min(full, half) >= 0.91
    assert abs(full - half) <= 0.003
