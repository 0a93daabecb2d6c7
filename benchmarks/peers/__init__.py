"""anomalib's PaDiM compared with padim-ray: `make bench-peers` installs anomalib.

Both use the same images, weights, size and machine, in turns. The difference between a small and a
large directory excludes start-up. Whole processes of ours, start-up and calibration included, are
compared with anomalib's rates, which include neither.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.archive import ARCHIVES, DISTINCT, many_images
from benchmarks.jobs import run, write_manifest
from benchmarks.start import PADIM_RAY
from benchmarks.timing import Figure, cores, figure, steady_rate
from padim_ray import PadimModel
from padim_ray.model.spec import new_spec
from padim_ray.pipeline.cluster.session import ray_session
from padim_ray.runs.options.model import ModelOptions

PYTHON = Path(".venv-peers/bin/python")
THEIR_SIZES = (100, 600)
OUR_SIZES = (250, 1500)  # more, because our runs are shorter and noise weighs more
CHANNELS = 100  # anomalib's default
WHOLE_SIZES = {"fit": 1000, "score": 400}
SAME_MODEL = {
    **{"n_features": CHANNELS, "regularization": "paper", "epsilon": 0.01001},
    **{"stride": 4, "neighbourhood": 1, "score_share": 0.0},
}
CASES: dict[str, dict[str, Any]] = {
    "100 channels, bfloat16": {**SAME_MODEL, "precision": "bfloat16"},
    "100 channels, float32": {**SAME_MODEL, "precision": "float32"},
    "all channels, bfloat16": {"precision": "bfloat16"},
    "all channels, float32": {"precision": "float32"},
}


def measure(root: Path, weights: str, repeats: int) -> list[Figure]:
    """Compare anomalib's PaDiM with 100 channels and our jobs with these settings."""
    if not PYTHON.exists():
        print("Skipped: anomalib is not installed (make bench-peers)")
        return []
    kind = ARCHIVES["JPEG 700²"]
    directories = {size: root / f"peers-{size}" for size in THEIR_SIZES}
    for size, directory in directories.items():
        many_images(directory, size, *kind)
    files = many_images(root / "peers", max(OUR_SIZES), *kind)
    manifests = {
        size: write_manifest(files[:size], root / f"peers-{size}.parquet") for size in OUR_SIZES
    }
    theirs: dict[str, list[float]] = {"fit": [], "score": []}
    ours = {name: {job: [] for job in theirs} for name in CASES}
    whole: dict[str, list[float]] = {job: [] for job in theirs}
    megabytes = []
    for repeat in range(repeats):
        runs = [run_anomalib(directory, weights) for directory in directories.values()]
        megabytes.append(runs[1]["megabytes"])
        add_rates(theirs, THEIR_SIZES, runs)
        with ray_session(None):
            for name, options in CASES.items():
                place = root / f"peers-{repeat}-{name}".replace(" ", "-")
                runs = [
                    run(place / str(size), manifest, weights, **options)
                    for size, manifest in manifests.items()
                ]
                shutil.rmtree(place)
                add_rates(ours[name], OUR_SIZES, runs)
        for job, seconds in run_whole(root, files, weights).items():
            whole[job].append(WHOLE_SIZES[job] / seconds)
    figures = [
        figure("peers", "maps, greatest relative difference", [compare_maps(root, weights)], "")
    ]
    what = f"anomalib, peak memory at {THEIR_SIZES[1]} images"
    figures.append(figure("peers", what, megabytes, "MB"))
    for job, rates in theirs.items():
        figures.append(figure("peers", f"anomalib, {job}", rates, "images/s"))
        what = f"padim-ray, {job}, whole process of {WHOLE_SIZES[job]} images"
        figures.append(figure("peers", what, whole[job], "images/s"))
        ratios = [a / b for a, b in zip(whole[job], rates, strict=True)]
        figures.append(figure("peers", f"ratio, {job}, whole process", ratios, "times"))
        for name in CASES:
            figures.append(
                figure("peers", f"padim-ray, {job}, {name}", ours[name][job], "images/s")
            )
            ratios = [a / b for a, b in zip(ours[name][job], rates, strict=True)]
            figures.append(figure("peers", f"ratio, {job}, {name}", ratios, "times"))
    return figures


def add_rates(
    rates: dict[str, list[float]], sizes: tuple[int, int], runs: list[dict[str, float]]
) -> None:
    small, large = runs
    for job, values in rates.items():
        values.append(steady_rate(sizes, (small[job], large[job])))


def run_whole(root: Path, files: list[Path], weights: str) -> dict[str, float]:
    """Seconds of `fit` with calibration, and of `score`, from the shell with their defaults."""
    place, seconds = root / "peers-whole", {}
    commands: dict[str, list[str | Path]] = {
        "fit": ["--weights", weights],
        "score": ["--out", place / "out"],
    }
    for job, options in commands.items():
        manifest = write_manifest(files[: WHOLE_SIZES[job]], root / f"peers-whole-{job}.parquet")
        started = time.perf_counter()
        subprocess.run(
            [PADIM_RAY, job, "--manifest", manifest, "--model", place / "model", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds[job] = time.perf_counter() - started
    shutil.rmtree(place)
    return seconds


def run_anomalib(directory: Path, weights: str, *, maps: Path | None = None) -> dict[str, float]:
    """Seconds of `fit` and `score`, and peak `megabytes`."""
    command = [
        *(PYTHON, Path(__file__).with_name("anomalib_padim.py")),
        *("--train", directory, "--test", directory, "--weights", weights),
        *("--channels", json.dumps(kept_channels(weights))),
        *("--workers", cores()),
        *(("--maps", maps) if maps else ()),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"anomalib failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def kept_channels(weights: str) -> list[int]:
    """Our channels, numbered across all layers."""
    spec, _ = new_spec(ModelOptions(weights=weights, n_features=CHANNELS), "float32")
    starts = dict(zip(spec.channels, (0, 64, 192), strict=True))
    return [starts[layer] + index for layer, kept in spec.channels.items() for index in kept]


def compare_maps(root: Path, weights: str) -> float:
    """Greatest relative difference of the maps, with float32 and images that need no resizing."""
    files = many_images(root / "peers-maps", DISTINCT, 256, "RGB", "PNG")
    run_anomalib(files[0].parent, weights, maps=root / "maps.npy")
    theirs = np.load(root / "maps.npy").squeeze()
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    model = PadimModel(weights=weights, precision="float32", **SAME_MODEL)
    model.update(images)
    return float(np.abs(model.score(images).maps.numpy() / theirs - 1).max())
