"""A cluster of machines with their own addresses, and a store with a small archive.

Where network namespaces aren't permitted, all machines are this one: its nodes then have one
address and ports of their own, and what needs more is skipped.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import padim_ray
from padim_ray.pipeline.cluster.device import FAKE_GPUS
from padim_ray.planning.batches import MIN_SHARD_IMAGES
from tests.cluster.network import Network, network
from tests.conftest import S3Server, serve_s3
from tests.faults.cluster import Cluster
from tests.faults.machine import LOCALHOST, Machine
from tests.faults.proxy import FaultProxy

DECODE = "padim_decode"
DECODES = f'--resources={{"{DECODE}": 1000}}'
HAS_GPU = "--num-gpus=1"
MODEL = {"image_size": 32, "n_features": 20, "precision": "float32"}
SCORING = {"heatmaps": "none", "report_images": 0}
PATIENT = {"read_timeout": 300}  # for requests that a test holds back
GROUPS = ("bolt", "nut", "pin", "ring")
MANY = 4 * MIN_SHARD_IMAGES  # images per group: four shards


@pytest.fixture(scope="package")
def whole_network() -> Iterator[Network | None]:
    with ExitStack() as stack:
        try:
            yield stack.enter_context(network())
        except OSError as error:
            print(f"all machines are this one: {error}")
            yield None


@pytest.fixture(scope="package")
def add_machine(whole_network) -> Callable[[], Machine]:
    return whole_network.add_machine if whole_network else lambda: LOCALHOST


@pytest.fixture(scope="package")
def unplug(whole_network) -> Callable[[Machine], None]:
    if whole_network is None:
        pytest.skip("needs the right to make network namespaces, and iproute2")
    return whole_network.unplug


@pytest.fixture(scope="package")
def store(add_machine, tmp_path_factory, draw_image) -> Iterator[S3Server]:
    """An S3 server with buckets `archive`, of 12 images to train and 6 to test, and `out`."""
    with serve_s3(tmp_path_factory.mktemp("store"), add_machine()) as server:
        images = tmp_path_factory.mktemp("images")
        draw_archive(images, draw_image, train=12, test=6)
        server.upload("archive", images)
        server.upload("out")
        yield server


def draw_archive(root: Path, draw_image: Callable, **counts: int) -> None:
    """Images GROUP/FOLDER/NUMBER.png; every seventh test image has a defect."""
    for shade, group in enumerate(GROUPS):
        for folder, count in counts.items():
            directory = root / group / folder
            directory.mkdir(parents=True)
            for index in range(count):
                seed = 10_000 * shade + 1_000 * len(folder) + index
                is_defective = folder == "test" and index % 7 == 0
                image = draw_image(seed, size=32, defective=is_defective, shade=shade)
                image.save(directory / f"{index:03d}.png")


@pytest.fixture(scope="package")
def many(store, one_node, draw_image, tmp_path_factory) -> Path:
    """Results of one node for a bucket `many`, whose shards are enough to disturb two actors."""
    images = tmp_path_factory.mktemp("many")
    draw_archive(images, draw_image, test=MANY)
    store.upload("many", images)
    padim_ray.score(
        **{"images": "s3://many/{group}/test/*", "model": one_node.model, **SCORING},
        **{"out": "s3://out/one-node/many", "storage_options": store.options},
    )
    return store.root / "out/one-node/many"


@pytest.fixture(scope="package")
def proxy(store, whole_network) -> Iterator[FaultProxy]:
    """A proxy in front of the store, at the outside's address."""
    host = whole_network.outside.address if whole_network else LOCALHOST.address
    with FaultProxy(store, host=host) as proxy:
        yield proxy


@pytest.fixture(scope="package")
def cluster(add_machine) -> Iterator[Cluster]:
    """A head without CPUs, a node that decodes, and one whose GPU is announced but not there."""
    environment = {
        FAKE_GPUS: "1",
        "RAY_num_workers_soft_limit": "8",
        "RAY_health_check_timeout_ms": "2000",  # to notice a lost node; the default is 10 s
    }
    with Cluster(workers=0, head=add_machine(), dashboard=True, environment=environment) as cluster:
        for option in (DECODES, HAS_GPU):
            cluster.add_node(add_machine(), option)
        yield cluster


@dataclass(frozen=True)
class OneNode:
    """A model and results that Ray in this process makes of the archive.

    `model`: its URI. `version` and `results`: where the store keeps the model and the results.
    """

    model: str
    version: Path
    results: Path


@pytest.fixture(scope="package")
def one_node(ray_cluster, store, weights) -> OneNode:
    place = "s3://out/one-node"
    shared = {"model": f"{place}/model", "storage_options": store.options}
    padim_ray.fit(images="s3://archive/{group}/train/*", weights=weights, **MODEL, **shared)
    padim_ray.score(images="s3://archive/{group}/test/*", out=f"{place}/run", **shared)
    kept = store.root / "out/one-node"
    return OneNode(shared["model"], kept / "model", kept / "run")


@pytest.fixture
def job(proxy, weights, one_node) -> Callable[..., list[str]]:
    """The command of a job that reads through the proxy; the cluster's GPU nodes don't decode."""

    def command(cluster: Cluster, name: str, place: str, *more: object) -> list[str]:
        storage = json.dumps(proxy.options | {"config_kwargs": PATIENT})
        shared = ("--storage-options", storage, "--decode-resource", DECODE, *more)
        images = ("--images", "s3://many/{group}/test/*")
        if name == "fit":
            fitting = ("--model", place, "--weights", weights, *flags(MODEL))
            return cluster.job("fit", *images, *fitting, *shared)
        scoring = ("--model", one_node.model, "--out", place, *flags(SCORING))
        return cluster.job("score", *images, *scoring, *shared)

    return command


def flags(options: dict[str, object]) -> list[object]:
    """Arguments of the command line for these options."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return [part for pair in pairs for part in pair]
