"""`make demo`: draw a small archive, fit, score, and say how well the defects were found."""

import logging
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torchvision
from sklearn.metrics import roc_auc_score

import padim_ray
from demo.archive import draw_archive

ROOT = Path("demo-run").resolve()
BACKBONE = "resnet18"


def main() -> None:
    """Run the demo in ./demo-run, which is made afresh."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("padim_ray").setLevel(logging.INFO)
    shutil.rmtree(ROOT, ignore_errors=True)
    print(f"Drawing an archive of two products in {ROOT / 'archive'}")
    draw_archive(ROOT / "archive")
    padim_ray.fit(
        images=f"{ROOT}/archive/{{group}}/train/good/*",
        model=str(ROOT / "model"),
        backbone=BACKBONE,
        weights=trunk_weights(),
    )
    summary = padim_ray.score(
        images=f"{ROOT}/archive/{{group}}/test/{{defect}}/*",
        model=str(ROOT / "model"),
        out=str(ROOT / "results"),
    )
    print_table(summary.places["results"])
    print(f"Results:   {summary.places['results']}")
    print(f"A heatmap: {highest_heatmap(summary.places['results'])}")


def trunk_weights() -> str:
    """ImageNet weights where they can be had: from PADIM_RAY_WEIGHTS, or by torchvision."""
    if "PADIM_RAY_WEIGHTS" in os.environ:
        return os.environ["PADIM_RAY_WEIGHTS"]
    weights = torchvision.models.get_model_weights(BACKBONE).IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        print(f"No ImageNet weights ({error}): a random trunk takes their place, in this demo only")
        return str(random_trunk(ROOT / "random_trunk.pth"))
    return weights.name


def random_trunk(path: Path) -> Path:
    """Save a seeded random ResNet: worse than a trained one, but it sees edges and textures too."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(BACKBONE).state_dict(), path)
    return path


def print_table(results: str) -> None:
    """Print images, failures and AUROC of each group, from the folders' names."""
    table = pq.read_table(results, columns=["group", "defect", "status", "score"]).to_pandas()
    print(f"\n{'group':<10}{'images':>8}{'failed':>8}{'AUROC':>8}")
    for group, rows in table.groupby("group"):
        scored = rows[rows.status == "scored"]
        auroc = roc_auc_score(scored.defect != "good", scored.score)
        failed = len(rows) - len(scored)
        print(f"{group:<10}{len(rows):>8}{failed:>8}{auroc:>8.3f}")
    print()


def highest_heatmap(results: str) -> str:
    """Name the heatmap of the image with the highest score."""
    table = pq.read_table(results, columns=["score", "heatmap_uri"])
    return table.sort_by([("score", "descending")])["heatmap_uri"][0].as_py()


if __name__ == "__main__":
    main()
