"""Whole jobs over a few images, from the shell: mostly start-up, and what of it is Ray's own."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.archive import ARCHIVES, many_images
from benchmarks.jobs import listed
from benchmarks.timing import Figure, figure

IMAGES = 200
RAY_ALONE = """
import ray, ray.data

class Nothing:
    def __call__(self, block):
        return block

ray.init("local", include_dashboard=False, log_to_driver=False)
blocks = ray.data.range(200, override_num_blocks=4)
actor = ray.data.ActorPoolStrategy(size=1)
assert len(blocks.map_batches(Nothing, compute=actor, num_cpus=0.5).take_all()) == 200
"""


def measure(root: Path, weights: str, repeats: int) -> list[Figure]:
    """Seconds of Ray Data with one actor that does nothing, of fit and of score, taking turns."""
    files = many_images(root / "start", IMAGES, *ARCHIVES["JPEG 700²"])
    manifest = listed(files, root / "start.parquet")
    model = str(root / "start-model")
    padim_ray = str(Path(sys.executable).with_name("padim-ray"))
    images = ["--manifest", manifest, "--model", model]
    commands = {
        "Ray alone": [sys.executable, "-c", RAY_ALONE],
        "fit": [padim_ray, "fit", *images, "--weights", weights, "--overwrite"],
        "score": [padim_ray, "score", *images, "--out", str(root / "start-out"), "--overwrite"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return [
        figure("start", f"{name}, {IMAGES} images, whole process", values, "s")
        for name, values in seconds.items()
    ]
