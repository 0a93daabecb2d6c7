"""Accuracy on real images with real ImageNet weights, through an S3 server."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

import padim_ray

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
    for split in ("train", "test"):
        shutil.copytree(DATA / split, source / "tile" / split)
    shutil.copy(WEIGHTS, source / "trunk.pth")
    s3.upload("factory", source)
    yield s3
    shutil.rmtree(s3.root / "factory")


def auroc(s3, name, **options):
    """Fit and score through S3; the model and results are removed afterwards."""
    padim_ray.fit(
        images="s3://factory/tile/train/good/*.jpg",
        model=f"s3://factory/{name}",
        weights="s3://factory/trunk.pth",
        storage_options=s3.options,
        **options,
    )
    padim_ray.score(
        images="s3://factory/tile/test/{defect}/*.jpg",
        model=f"s3://factory/{name}",
        out=f"s3://factory/{name}-results",
        storage_options=s3.options,
        heatmaps="none",
    )
    table = pq.read_table(s3.root / f"factory/{name}-results/results").to_pandas()
    assert len(table) == 583
    shutil.rmtree(s3.root / f"factory/{name}")
    return roc_auc_score(table.defect != "good", table.score)


def test_all_channels_with_shrinkage(bucket):
    full = auroc(bucket, "float32", precision="float32")
    half = auroc(bucket, "bfloat16", precision="bfloat16")
    print(f"\nimage AUROC, defaults: float32 {full:.4f}, bfloat16 {half:.4f}")
    assert min(full, half) >= 0.965
    assert abs(full - half) <= 0.003


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
