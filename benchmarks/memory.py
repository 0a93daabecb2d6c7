"""Peak memory of the actors by number of images, and nested against dense covariances.

An actor's memory is its private memory (RssAnon). Pages of the object store, which it maps while
reading, are shared and bounded by Ray.
"""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

import padim_ray
from benchmarks.archive import many_images, random_trunk
from benchmarks.jobs import write_manifest
from benchmarks.start import PADIM_RAY
from benchmarks.timing import Figure, figure, sample
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions

SIZES = (100, 1000, 10_000)
ACTORS = {"fit": "PartialSums", "score": "ScoreImages"}


def measure(root: Path, weights: str, sizes: tuple[int, ...] = SIZES) -> list[Figure]:
    """Fit and score N images with all of resnet18's channels."""
    files = many_images(root / "memory", max(sizes), 300, "L", "JPEG")
    peaks: dict[str, list[float]] = {job: [] for job in ACTORS}
    figures = []
    for size in sizes:
        manifest = write_manifest(files[:size], root / f"memory-{size}.parquet")
        model, out = str(root / f"memory-model-{size}"), str(root / f"memory-out-{size}")
        with sample(lambda: private_memory(ACTORS["fit"])) as seen:
            padim_ray.fit(manifest=manifest, model=model, weights=weights, calibration_images=0)
        peaks["fit"].append(max(seen))
        with sample(lambda: private_memory(ACTORS["score"])) as seen:
            padim_ray.score(manifest=manifest, model=model, out=out, heatmaps="none")
        peaks["score"].append(max(seen))
    for job, values in peaks.items():
        for size, value in zip(sizes, values, strict=True):
            figures.append(figure("memory", f"{job}'s actor, {size:,} images", [value], "MB"))
        growth = 100 * (values[-1] / values[-2] - 1)
        step = f"{sizes[-2]:,} → {sizes[-1]:,} images"
        figures.append(figure("memory", f"{job}'s actor grows, {step}", [growth], "%"))
    return figures + wide_trunk(root, files[: sizes[0]]) + state_sizes(weights)


def wide_trunk(root: Path, files: list[Path]) -> list[Figure]:
    """Peak memory with the paper's larger model."""
    weights = root / "wide_resnet50_2.pth"
    random_trunk(weights, "wide_resnet50_2")
    images = ["--manifest", write_manifest(files, root / "memory-wide.parquet")]
    images += ["--model", str(root / "memory-wide-model")]
    jobs = {  # each in its own processes, so that no memory of earlier jobs counts
        "fit": ["--weights", str(weights), "--backbone", "wide_resnet50_2"],
        "score": ["--out", str(root / "memory-wide-out")],
    }
    figures = []
    for name, options in jobs.items():
        command = [PADIM_RAY, name, *images, *options]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL) as job,
            sample(lambda pid=job.pid: [sum(proportional_memory(pid))]) as seen,
        ):
            code = job.wait()
        if code:
            raise subprocess.CalledProcessError(code, command)
        what = f"wide_resnet50_2, {name}, {len(files)} images, all processes"
        figures.append(figure("memory", what, [max(seen)], "MB"))
    return figures


def state_sizes(weights: str) -> list[Figure]:
    """MB of a group's covariances: nested blocks, and one dense matrix per patch."""
    figures = []
    for n_features in ("all", 100):
        spec, _ = new_spec(ModelOptions(weights=weights, n_features=n_features), "float32")
        grid = spec.grid
        channels = sum(grid.channels)
        packed = spec.density.empty(grid, "meta").packed()
        nested = sum(t.nbytes for name, t in packed.items() if name.startswith("scatter")) / 1e6
        dense = 4e-6 * grid.cells[0] * channels**2
        what = f"covariances, {channels} channels"
        figures.append(figure("memory", f"{what}, nested", [nested], "MB"))
        figures.append(figure("memory", f"{what}, dense", [dense], "MB"))
    return figures


def private_memory(name: str) -> Iterator[float]:
    """Private memory in MB of each process whose title contains `name`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() not in (process / "cmdline").read_bytes():
                continue
            for line in (process / "status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    yield int(line.split()[1]) / 1000
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended meanwhile


def proportional_memory(pid: int) -> Iterator[float]:
    """Memory in MB of a process and each of its descendants; shared pages count once in the sum."""
    with suppress(psutil.Error):  # processes end meanwhile
        job = psutil.Process(pid)
        for process in [job, *job.children(recursive=True)]:
            with suppress(psutil.Error):
                yield process.memory_full_info().pss / 1e6
