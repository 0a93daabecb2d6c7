"""What all scenarios share: the archive behind the proxy, the jobs' commands, undisturbed runs."""

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
TRAINING_IMAGES, TEST_IMAGES = 110, 200  # of each group; one more of each can't be decoded
ROUND_IMAGES = 64
MODEL = ("--image-size", 64, "--n-features", 20, "--precision", "float32")
IMPATIENT = {"read_timeout": 3, "connect_timeout": 3}  # with requests that hang

Job = Literal["fit", "score"]


@dataclass
class Stage:
    """Commands on an archive in the bucket `faults`, and comparisons of what they leave.

    `directory`: for logs. Undisturbed runs are made when they are first compared with.
    """

    cluster: Cluster
    proxy: FaultProxy
    weights: str
    directory: Path
    model_options: tuple[object, ...] = MODEL
    undisturbed: dict[Job, str] = field(default_factory=dict)

    def new_place(self, name: str) -> str:
        """A prefix in the bucket that nothing is below."""
        return f"s3://faults-out/{name}-{secrets.token_hex(3)}"

    def path(self, uri: str) -> Path:
        """Where the S3 server keeps what is at a URI."""
        is_remote = uri.startswith("s3://")
        return self.proxy.server.root / uri.removeprefix("s3://") if is_remote else Path(uri)

    def progress(self, job: Job, place: str) -> Callable[[], int]:
        """How many results files, or rounds and groups' files, a job has finished at a place."""
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
        """Where the undisturbed run's model or results are, made when they are first asked for."""
        if job not in self.undisturbed:
            place = self.new_place(f"undisturbed-{job}")
            (run,) = self.run(job, place)
            assert run.code == 0, run.output
            self.undisturbed[job] = place
        return self.undisturbed[job]

    def compare(self, job: Job, place: str) -> Differences:
        """What a job left at `place`, beside an undisturbed run's."""
        expected, actual = (self.path(uri) for uri in (self.reference_place(job), place))
        if job == "score":
            return compare_results(read_results(expected), read_results(actual))
        version = open_version(Location.of(str(expected)))
        if not (actual / "CURRENT").exists():
            return Differences(lost=sum(x.images + x.failed for x in version.groups.values()))
        return compare_models(version, open_version(Location.of(str(actual))))


def draw_archive(root: Path, draw_image: Callable[..., Image.Image]) -> None:
    """GROUP/train and GROUP/test, where every seventh image has a defect."""
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
