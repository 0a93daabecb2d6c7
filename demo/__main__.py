"""`make demo`: draw a small archive, fit, evaluate, and print how well defects are found."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table

import padim_ray
from demo.archive import draw_archive
from padim_ray.evaluation.tables import LABELS

ROOT = Path("demo-run").resolve()
BACKBONE = "resnet18"


def main() -> None:
    """Run the demo in ./demo-run, which is recreated."""
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
    padim_ray.evaluate(
        images=f"{ROOT}/archive/{{group}}/test/{{defect}}/{{name}}.*",
        masks=f"{ROOT}/archive/{{group}}/ground_truth/{{defect}}/{{name}}_mask.png",
        model=str(ROOT / "model"),
        out=str(ROOT / "results"),
        alpha=0.05,
    )
    print_table(json.loads((ROOT / "results/metrics.json").read_text()))
    print(f"Results: {ROOT / 'results/results'}")
    print(f"Report:  {ROOT / 'results/report.html'}")


def trunk_weights() -> str:
    """ImageNet weights from PADIM_RAY_WEIGHTS or torchvision, or else random ones."""
    if "PADIM_RAY_WEIGHTS" in os.environ:
        return os.environ["PADIM_RAY_WEIGHTS"]
    weights = torchvision.models.get_model_weights(BACKBONE).IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        print(f"No ImageNet weights ({error}): this demo uses a random trunk instead")
        return str(random_trunk(ROOT / "random_trunk.pth"))
    return weights.name


def random_trunk(path: Path) -> Path:
    """Save a seeded random ResNet: worse than a trained one, but it detects edges and textures."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(BACKBONE).state_dict(), path)
    return path


def print_table(evaluation: dict[str, Any]) -> None:
    """Print the metrics of each group."""
    metrics = ("image_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "miss_rate")
    table = Table("group", *(LABELS[metric] for metric in metrics))
    for group, content in evaluation["groups"].items():
        table.add_row(group, *(f"{content['metrics'][name]['value']:.3f}" for name in metrics))
    Console().print(table)


if __name__ == "__main__":
    main()
