"""The set-up of all fault tests: an archive behind the proxy, jobs' commands, undisturbed runs."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.faults.cluster import Cluster
from tests.faults.killers import Start, run_until_done
from tests.faults.proxy import FaultProxy
from tests.faults.report import Differences, compare_models, compare_results, read_results

GROUPS = {"bolt": "png", "nut": "jpg", "pin": "png"}
TRAINING_IMAGES, TEST_IMAGES = 110, 200  # per group, besides one that can't be decoded
ROUND_IMAGES = 64
MODEL = ("--image-size", 64, "--n-features", 20, "--precision", "float32")
IMPATIENT = {"read_timeout": 3, "connect_timeout": 3}  # for hanging requests

Job = Literal["fit", "score", "update"]


@dataclass
class Stage:
    """Runs jobs on an archive in the bucket `faults`, and compares their results.

    `directory` is for logs. An undisturbed run is made when it is first needed.
    """

    cluster: Cluster
    proxy: FaultProxy
    weights: str
    directory: Path
    model_options: tuple[object, ...] = MODEL
    undisturbed: dict[Job, str] = field(default_factory=dict)

    def new_place(self, name: str) -> str:
        """A URI in the bucket with nothing below it."""
        return f"s3://faults-out/{name}-{secrets.token_hex(3)}"

    def path(self, uri: str) -> Path:
        """The path where the S3 server stores a URI."""
        is_remote = uri.startswith("s3://")
        return self.proxy.server.root / uri.removeprefix("s3://") if is_remote else Path(uri)

    def progress(self, job: Job, place: str) -> Callable[[], int]:
        """A function that counts the files that mark a job's progress at a place."""
        path = self.path(place)
        patterns = {
            "fit": ("versions/*/rounds/*.json", "versions/*/groups/*/*"),
            "score": ("results/part-*.parquet",),
        }[job]
        return lambda: sum(1 for pattern in patterns for _ in path.glob(pattern))

    def run(self, job: Job, place: str, *more: object, **how: Any) -> list[Start]:
        """Run a job as `run_until_done` does."""
        name = f"{place.rpartition('/')[2]}-{secrets.token_hex(2)}"
        command = self.command(job, place, *more)
        return run_until_done(self.cluster, command, self.directory / name, **how)

    def command(self, job: Job, place: str, *more: object) -> list[str]:
        """The command of a job that writes its model or its results to `place`."""
        storage = self.proxy.options | {"config_kwargs": IMPATIENT}
        shared = ("--storage-options", json.dumps(storage), *more)
        if job == "update":
            return self.cluster.job(
                *("update", "--images", "s3://faults/{group}/test/00*", "--model", place, *shared)
            )
        if job == "fit":
            return self.cluster.job(
                *("fit", "--images", "s3://faults/{group}/train/*", "--model", place),
                *("--weights", self.weights, "--round-images", ROUND_IMAGES),
                *self.model_options,
                *shared,
            )
        model = self.reference_place("fit")
        return self.cluster.job(
            *("score", "--images", "s3://faults/{group}/test/*"),
            *("--model", model, "--out", place, *shared),
        )

    def reference_place(self, job: Job) -> str:
        """The URI of the undisturbed run's model or results, which is made on first use."""
        if job not in self.undisturbed:
            place = self.new_place(f"undisturbed-{job}")
            (run,) = self.run(job, place)
            assert run.code == 0, run.output
            self.undisturbed[job] = place
        return self.undisturbed[job]

    def compare(self, job: Job, place: str) -> Differences:
        """Compare a job's results at `place` with an undisturbed run's."""
        expected, actual = (self.path(uri) for uri in (self.reference_place(job), place))
        if job == "score":
            return compare_results(read_results(expected), read_results(actual))
        version = open_version(Location.of(str(expected)))
        if not (actual / "CURRENT").exists():
            return Differences(lost=sum(x.images + x.failed for x in version.groups.values()))
        return compare_models(version, open_version(Location.of(str(actual))))


def draw_archive(root: Path, draw_image: Callable[..., Image.Image]) -> None:
    """Images in GROUP/train and GROUP/test; every seventh test image has a defect."""
    for shade, (group, suffix) in enumerate(GROUPS.items()):
        for folder, count in (("train", TRAINING_IMAGES), ("test", TEST_IMAGES)):
            directory = root / group / folder
            directory.mkdir(parents=True)
            for index in range(count):
                seed = 10_000 * shade + 1_000 * len(folder) + index
                is_defective = folder == "test" and index % 7 == 0
                image = draw_image(seed, defective=is_defective, shade=shade)
                image.save(directory / f"{index:03d}.{suffix}")
            (directory / f"broken.{suffix}").write_bytes(b"not an image")
