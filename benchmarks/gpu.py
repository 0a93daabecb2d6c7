"""Fit and score on a GPU compared with the trunk alone, without Ray: `python -m benchmarks.gpu`.

The trunk's images are already on the device. Those of fit and score are in host memory, as in the
jobs' actors, so the rates hold if decoding keeps up. `modules` is the same trunk run by PyTorch's
modules, `compiled` by PyTorch's compiler. It also runs on a CPU, for tests.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.archive import random_trunk
from benchmarks.timing import rates
from padim_ray.features.trunk import Trunk, native_precision
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions

CASES = (("resnet18", "100"), ("resnet18", "all"), ("wide_resnet50_2", "550"))
BATCHES = (32, 64, 128, 256, 512, 1024)
STEPS = 8  # batches per timed call, each as large as the embedder accumulates at once


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=lambda case: tuple(case.split("/")),
        default=CASES,
        help="backbone/channels, such as resnet18/all",
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0, help="per repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time the compiled trunk")
    parser.add_argument("--out", type=Path, help="write the rows to this file as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for backbone, channels in arguments.cases:
            options = ModelOptions(
                backbone=backbone,
                weights=random_trunk(Path(directory) / f"{backbone}.pth", backbone),
                n_features=channels if channels == "all" else int(channels),
                image_size=arguments.image_size,
            )
            spec, weights = new_spec(options, native_precision(device))
            for batch in arguments.batches:
                detector = Detector(spec, weights, device, batch)
                row = {"backbone": backbone, "channels": channels, "batch": batch}
                modules = Trunk(
                    backbone,
                    spec.channels,
                    weights,
                    precision=spec.precision,
                    device=device,
                    fuse=False,
                )
                trunks = {"modules": modules}
                if arguments.compile:
                    trunks["compiled"] = torch.compile(modules.compute)
                row |= measure(detector, trunks, arguments.repeats, arguments.seconds)
                rows.append(row)
                print(json.dumps(row, ensure_ascii=False), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


def measure(
    detector: Detector,
    others: Mapping[str, Callable[[torch.Tensor], object]],
    repeats: int,
    seconds: float,
) -> dict[str, float]:
    """Median images/s of the trunks alone, of fit and of score, and peak GPU memory in MB."""
    spec, device = detector.spec, detector.device
    height, width = spec.preprocessing.size
    pixels = torch.randint(0, 256, (detector.batch_size, height, width, 3), dtype=torch.uint8)
    host = pixels.permute(0, 3, 1, 2)
    on_device = host.to(device)
    steps = [host] * (STEPS if device.type == "cuda" else 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    statistics = detector.add_(detector.empty_statistics(), detector.embed(host))
    fitted = detector.load(fit_density(spec, statistics))

    def fit() -> int:
        for embeddings in detector.embed_each(steps):
            if embeddings.are_finite().all():
                detector.add_(statistics, embeddings)
        return len(steps) * len(host)

    def score() -> int:
        for embeddings in detector.embed_each(steps):
            detector.measure(embeddings, fitted).scores.cpu()
        return len(steps) * len(host)

    work = {"fit": fit, "score": score}
    for name, trunk in {"trunk": detector.embedder.trunk, **others}.items():
        work[name] = partial(run, trunk, on_device.split(detector.embedder.pass_size))
    figures = {row["what"]: row for row in rates("", work, repeats, seconds)}
    result = {name: row["median"] for name, row in figures.items()}
    for name in ("fit", "score"):
        result[f"{name} / trunk"] = result[name] / result["trunk"]
    if device.type == "cuda":
        result["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    return result


@torch.inference_mode()
def run(trunk: Callable[[torch.Tensor], object], batches: Sequence[torch.Tensor]) -> int:
    """Run the trunk, wait for the device and return the number of images."""
    for batch in batches:
        trunk(batch)
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return sum(map(len, batches))


if __name__ == "__main__":
    main()
