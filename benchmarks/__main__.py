"""`make bench`: throughput and memory of the stages and jobs.

Prints a table and writes it to build/ as JSON and as a chart. Every figure is a median with its
minimum and maximum. Compare only figures of the same run, because machines differ and are shared.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import padim_ray
from benchmarks import decode, jobs, memory, peers, stages, start
from benchmarks.archive import random_trunk
from benchmarks.picture import draw_picture
from benchmarks.timing import Figure, cores
from padim_ray.pipeline.cluster.memory import prepare_memory

OUTPUT = Path("build/bench.json")
SECTIONS: dict[str, Callable[[Path, str, int], list[Figure]]] = {
    "decode": lambda root, weights, repeats: decode.measure(repeats),
    "stages": lambda root, weights, repeats: stages.measure(weights, repeats),
    "jobs": jobs.measure,
    "start": start.measure,
    "memory": lambda root, weights, repeats: memory.measure(root, weights),
    "peers": peers.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="sections to run",
    )
    parser.add_argument("--weights", help="resnet18 weights (default: random ones)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    prepare_memory(keep_activations=True)  # as in the actors
    figures = []
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        root = Path(directory)
        weights = arguments.weights or random_trunk(root / "resnet18.pth")
        for name in arguments.only:
            print(f"Measuring: {name}", flush=True)
            figures += SECTIONS[name](root, weights, arguments.repeats)
    report = {"machine": machine(), "figures": figures}
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    show(report)
    draw_picture(report, OUTPUT.with_suffix(".png"))
    print(f"JSON: {OUTPUT}\nPicture: {OUTPUT.with_suffix('.png')}")


def machine() -> dict[str, str | int]:
    """The hardware and the versions that the figures depend on."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": processor(),
        "cores": cores(),
        "bfloat16": next(
            (name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), "emulated"
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "padim-ray": padim_ray.__version__,
        **{name: version(name) for name in ("ray", "torch", "torchvision", "pillow")},
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(report: dict) -> None:
    table = Table("stage", "what", "median", "min", "max", "unit")
    for row in report["figures"]:
        numbers = [f"{row[name]:,.4g}" for name in ("median", "min", "max")]
        table.add_row(row["stage"], row["what"], *numbers, row["unit"])
    console = Console(width=120)
    console.print(", ".join(f"{name}: {value}" for name, value in report["machine"].items()))
    console.print(table)


if __name__ == "__main__":
    main()
