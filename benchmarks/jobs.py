"""The jobs at steady state: images/s, and efficiency compared with their stages.

`python -m benchmarks.jobs` runs this section alone. The difference between a small and a large
archive excludes start-up. Efficiency is the time per image that the stages alone need on all cores,
divided by the job's. The stages are measured before Ray starts and after it ends, because even an
idle Ray uses the cores. Each kind of process's share of the cores is measured during the larger
scoring.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import padim_ray
from benchmarks import decode, stages
from benchmarks.archive import ARCHIVES, many_images, random_trunk
from benchmarks.shares import shares
from benchmarks.timing import Figure, clock, figure, rates, steady_rate
from padim_ray.pipeline.cluster.session import ray_session

SIZES = (1000, 3000)
NEEDS = {
    "fit": ("decode", "trunk", "moments"),
    "score": ("decode", "trunk", "distances", "map and score"),
}


def measure(root: Path, weights: str, repeats: int, sizes: tuple[int, int] = SIZES) -> list[Figure]:
    """Fit and score the first N images of each archive for two N, in turns."""
    manifests = {
        (name, size): write_manifest(
            files[:size], root / f"{name}-{size}.parquet".replace(" ", "-")
        )
        for name, kind in ARCHIVES.items()
        for files in [many_images(root / name.replace(" ", "-"), max(sizes), *kind)]
        for size in sizes
    }
    work = stages.stages(*stages.prepare(weights, "all", "bfloat16"))
    measured: dict[tuple[str, str], dict[str, list[float]]] = {}
    core_shares: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats):
        for name in ARCHIVES:
            place = root / f"{repeat}-{name}"
            before = stage_seconds(work, name)
            found: Counter[str] = Counter()
            with ray_session(None):
                run(place / "first", manifests[name, sizes[0]], weights)  # starts the workers
                small = run(place / "small", manifests[name, sizes[0]], weights)
                large = run(place / "large", manifests[name, sizes[1]], weights, shares(found))
            after = stage_seconds(work, name)
            shutil.rmtree(place)
            for kind, share in found.items():
                core_shares.setdefault((name, kind), []).append(share)
            for job, needed in NEEDS.items():
                rate = steady_rate(sizes, (small[job], large[job]))
                alone = sum(before[stage] + after[stage] for stage in needed) / 2
                values = measured.setdefault((job, name), {})
                values.setdefault("rate", []).append(rate)
                values.setdefault("efficiency", []).append(alone * rate)
                values.setdefault("start", []).append(small[job] - sizes[0] / rate)
    figures = []
    for (job, name), values in measured.items():
        figures.append(figure(job, f"{name}, without start-up", values["rate"], "images/s"))
        figures.append(figure(job, f"{name}, efficiency", values["efficiency"], "of 1"))
        figures.append(figure(job, f"{name}, start-up and end", values["start"], "s"))
    for (name, kind), values in core_shares.items():
        figures.append(figure("score", f"{name}, cores: {kind}", values, "of 1"))
    return figures


def stage_seconds(work: Mapping[str, Callable[[], int]], archive: str) -> Mapping[str, float]:
    """Seconds per image that each stage alone needs on all cores."""
    seconds = {row["what"]: 1 / row["median"] for row in rates("", work, repeats=1, seconds=1)}
    return seconds | {"decode": 1 / decode.measure_all_cores(archive)}


def run(
    directory: Path,
    manifest: str,
    weights: str,
    during_score: AbstractContextManager[None] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Seconds of fitting with these options, and of scoring."""
    started, model = clock(), str(directory / "model")
    padim_ray.fit(manifest=manifest, model=model, weights=weights, calibration_images=0, **options)
    fitted = clock()
    out = str(directory / "out")
    with during_score or nullcontext():
        padim_ray.score(manifest=manifest, model=model, out=out, heatmaps="none", report_images=0)
    return {"fit": fitted - started, "score": clock() - fitted}


def write_manifest(files: list[Path], path: Path) -> str:
    """Write a manifest that lists the files and return its path."""
    pq.write_table(pa.table({"uri": [str(file) for file in files]}), path)
    return str(path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        base = Path(directory)
        for row in measure(base, random_trunk(base / "resnet18.pth"), repeats=3):
            print(f"{row['stage']:<7}{row['what']:<40}{row['median']:>9.2f} {row['unit']}")
