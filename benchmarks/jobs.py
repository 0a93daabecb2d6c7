"""The jobs as a whole: images/s with and without start-up, and the actors' peak memory.

`python -m benchmarks.jobs` runs this alone. Memory is what an actor has for itself (RssAnon): the
object store's pages, which it maps while reading, are shared, and bounded by Ray.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import padim_ray
from benchmarks.archive import many_images, random_trunk
from benchmarks.timing import Figure, figure

SIZES = (200, 2000)
ACTORS = {"fit": "PartialSums", "score": "ScoreImages"}


def measure(root: Path, weights: str, sizes: tuple[int, int] = SIZES) -> list[Figure]:
    """Fit and score the first N images of `root`/archive, for two N."""
    seconds: dict[tuple[str, int], float] = {}
    memory: dict[tuple[str, int], float] = {}
    figures = []
    for size in sizes:
        manifest = listed(root / "archive", size, root / f"{size}.parquet")
        model = str(root / f"model-{size}")
        with peak_memory(ACTORS["fit"]) as peak:
            summary = padim_ray.fit(
                manifest=manifest, model=model, weights=weights, calibration_images=size
            )
        calibrating = summary.stages["calibrate"]
        seconds["fit", size] = summary.seconds - calibrating
        memory["fit", size] = max(peak)
        with peak_memory(ACTORS["score"]) as peak:
            summary = padim_ray.score(
                manifest=manifest, model=model, out=str(root / f"out-{size}"), heatmaps="none"
            )
        seconds["score", size], memory["score", size] = summary.seconds, max(peak)
        ratio = calibrating / summary.stages["score"]
        figures.append(figure("fit", f"calibration of {size} images", [ratio], "scoring passes"))
    small, large = sizes
    for job in ACTORS:
        steady = (large - small) / (seconds[job, large] - seconds[job, small])
        figures.append(figure(job, "without start-up", [steady], "images/s"))
        for size in sizes:
            figures.append(figure(job, f"{size} images", [size / seconds[job, size]], "images/s"))
        for size in sizes:
            figures.append(figure(job, f"actor, {size} images", [memory[job, size]], "MB peak"))
        growth = 100 * (memory[job, large] / memory[job, small] - 1)
        figures.append(figure(job, f"actor's memory, {small} → {large} images", [growth], "%"))
    return figures


def listed(archive: Path, count: int, path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    uris = [str(image) for image in sorted(archive.rglob("*.png"))[:count]]
    pq.write_table(pa.table({"uri": uris}), path)
    return str(path)


@contextmanager
def peak_memory(name: str) -> Iterator[list[float]]:
    """Sample the private memory of the processes whose title holds `name`, in MB."""
    peaks, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            peaks.extend(private_memory(name))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def private_memory(name: str) -> Iterator[float]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() not in (process / "cmdline").read_bytes():
                continue
            for line in (process / "status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    yield int(line.split()[1]) / 1000
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        base = Path(directory)
        many_images(base / "archive", max(SIZES))
        for row in measure(base, random_trunk(base / "resnet18.pth")):
            print(f"{row['stage']:<7}{row['what']:<36}{row['median']:>9.1f} {row['unit']}")
