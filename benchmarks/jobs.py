"""The jobs at steady state: images/s, and how near to what their stages allow.

`python -m benchmarks.jobs` runs this alone. Start-up is left out by comparing a small with a large
archive; efficiency is the core-seconds per image that the stages need alone, on all cores, divided
by those that the job took: cores × time, busy or not.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import padim_ray
from benchmarks import decode, stages
from benchmarks.archive import ARCHIVES, many_images, random_trunk
from benchmarks.timing import Figure, cores, figure, rates, steady_rate
from padim_ray.pipeline.session import ray_session

SIZES = (250, 2250)
NEEDS = {
    "fit": ("trunk", "moments"),
    "score": ("trunk", "distances", "map and score"),
}


def measure(root: Path, weights: str, repeats: int, sizes: tuple[int, int] = SIZES) -> list[Figure]:
    """Fit and score the first N images of each archive, for two N, taking turns."""
    manifests = {
        (name, size): listed(files[:size], root / f"{name}-{size}.parquet".replace(" ", "-"))
        for name, kind in ARCHIVES.items()
        for files in [many_images(root / name.replace(" ", "-"), max(sizes), *kind)]
        for size in sizes
    }
    speed: dict[tuple[str, str], list[float]] = {}
    alone = stage_seconds(weights, repeats)
    with ray_session(None):
        for repeat in range(repeats):
            for name in ARCHIVES:
                runs = [
                    run(root / f"{repeat}-{name}-{size}", manifests[name, size], weights)
                    for size in sizes
                ]
                small, large = runs
                for job in NEEDS:
                    rate = steady_rate(sizes, (small[job], large[job]))
                    speed.setdefault((job, name), []).append(rate)
    figures = []
    for (job, name), values in speed.items():
        figures.append(figure(job, f"{name}, without start-up", values, "images/s"))
        least = alone[name] + sum(alone[stage] for stage in NEEDS[job])
        shares = [least * value / cores() for value in values]
        figures.append(figure(job, f"{name}, efficiency", shares, "of 1"))
    return figures


def stage_seconds(weights: str, repeats: int) -> Mapping[str, float]:
    """Core-seconds per image of each stage and of decoding each archive, on all cores at once."""
    decoding = decode.measure_all_cores(repeats)
    rows = rates("", stages.stages(*stages.prepare(weights, "all", "bfloat16")), repeats)
    seconds = {row["what"]: cores() / row["median"] for row in rows}
    return seconds | {name: cores() / median(values) for name, values in decoding.items()}


def run(directory: Path, manifest: str, weights: str, **options: Any) -> dict[str, float]:
    """Fit, with these options, and score: both in seconds."""
    model = str(directory / "model")
    fitted = padim_ray.fit(
        manifest=manifest, model=model, weights=weights, calibration_images=0, **options
    )
    scored = padim_ray.score(
        manifest=manifest, model=model, out=str(directory / "out"), heatmaps="none", report_images=0
    )
    return {"fit": fitted.seconds, "score": scored.seconds}


def listed(files: list[Path], path: Path) -> str:
    pq.write_table(pa.table({"uri": [str(file) for file in files]}), path)
    return str(path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        base = Path(directory)
        for row in measure(base, random_trunk(base / "resnet18.pth"), repeats=3):
            print(f"{row['stage']:<7}{row['what']:<40}{row['median']:>9.2f} {row['unit']}")
