"""`make bench`: images/s of each stage and job, and peak memory, as a table and as JSON.

Every figure is a median with its minimum and maximum; compare figures of one run only, since
machines are shared and differ.
"""

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import decode, jobs, trunk
from benchmarks.archive import many_images, random_trunk

OUTPUT = Path("build/bench.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=(200, 2000),
        metavar="N",
        help="archives' sizes for the jobs, the smaller first",
    )
    parser.add_argument("--weights", help="resnet18 weights; default: random ones, equally fast")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        root = Path(directory)
        weights = arguments.weights or random_trunk(root / "resnet18.pth")
        many_images(root / "archive", max(arguments.images))
        figures = [
            *decode.measure(arguments.repeats),
            *trunk.measure(weights, arguments.repeats),
            *jobs.measure(root, weights, tuple(arguments.images)),
        ]
    report = {"machine": machine(), "figures": figures}
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(report, indent=1))
    show(report)
    print(f"JSON: {OUTPUT}")


def machine() -> dict[str, str | int]:
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("padim-ray", "ray", "torch", "pillow")},
    }


def show(report: dict) -> None:
    table = Table("stage", "what", "median", "min", "max", "unit")
    for row in report["figures"]:
        numbers = [f"{row[name]:,.1f}" for name in ("median", "min", "max")]
        table.add_row(row["stage"], row["what"], *numbers, row["unit"])
    console = Console(width=120)
    console.print(", ".join(f"{name}: {value}" for name, value in report["machine"].items()))
    console.print(table)


if __name__ == "__main__":
    main()
