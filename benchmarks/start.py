"""Whole jobs on a few images, from the shell: mostly start-up, compared with Ray's own.

And a fit of sixteen small groups, whose Gaussians take as long as their images.
"""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.archive import ARCHIVES, many_images
from benchmarks.jobs import write_manifest
from benchmarks.timing import Figure, figure

IMAGES = 200
GROUPS = (*[30] * 10, 34, 36, 38, 40, 40, 300)  # images
PADIM_RAY = str(Path(sys.executable).with_name("padim-ray"))
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
    """Seconds of Ray Data with one idle actor, of fit and of score, in turns.

    With few images, calibration dominates a fit, and drawing heatmaps a score.
    """
    files = many_images(root / "start", sum(GROUPS), *ARCHIVES["JPEG 700²"])
    manifest = write_manifest(files[:IMAGES], root / "start.parquet")
    grouped = root / "start-groups.parquet"
    names = [f"g{group:02d}" for group, images in enumerate(GROUPS) for _ in range(images)]
    pq.write_table(pa.table({"uri": list(map(str, files)), "group": names}), grouped)
    model = str(root / "start-model")
    images = ["--manifest", manifest, "--model", model, "--overwrite"]
    fit = [PADIM_RAY, "fit", *images, "--weights", weights]
    score = [PADIM_RAY, "score", *images, "--out", str(root / "start-out")]
    commands = {
        "Ray alone": [sys.executable, "-c", RAY_ALONE],
        "fit, no calibration": [*fit, "--calibration-images", "0"],
        "score, no pictures": [*score, "--heatmaps", "none", "--report-images", "0"],
        "fit": fit,
        "score, 200 heatmaps": score,
        "fit, 16 groups": [
            *(PADIM_RAY, "fit", "--manifest", str(grouped), "--weights", weights, "--overwrite"),
            *("--model", f"{model}-groups"),
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return [
        figure("start", f"{name}, {images_of(name)} images, whole process", values, "s")
        for name, values in seconds.items()
    ]


def images_of(command: str) -> int:
    return sum(GROUPS) if "groups" in command else IMAGES
