"""What the driver and Ray's scheduler cost, with 1 to 64 actors: `python -m benchmarks.scaling`.

A cluster of several node processes on this machine runs the scoring pipeline's shape (shards,
decoding tasks, a pool of actors, writing tasks) with the work replaced: decoding makes tiny blocks,
the trunk sleeps. What is left is bookkeeping, whose CPU time per shard says how many actors one
driver can keep busy. Before that, what a list of images and a group's sums weigh.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.cluster_utils import Cluster
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from benchmarks.archive import random_trunk
from padim_ray.manifest import shard_rows, shard_table, sort_images
from padim_ray.options import ModelOptions
from padim_ray.pipeline.merge import FAN_IN
from padim_ray.pipeline.partial_sums import images_per_partial
from padim_ray.pipeline.session import data_context, rows_of
from padim_ray.spec import new_spec

SHARD_IMAGES = 256
NODES = 4
SLOTS = 96  # logical CPUs of all nodes: bookkeeping only
ACTORS = (1, 2, 4, 8, 16, 32, 64)


class SleepingActor:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, shard: pa.Table) -> pa.Table:
        time.sleep(self.seconds)
        return shard


def decode(shard: pa.Table) -> pa.Table:
    return shard.append_column("image", pa.array([b"\0" * 16] * shard.num_rows))


def write(shard: pa.Table) -> pa.Table:
    return pa.table({"shard": shard["shard"][:1], "count": [shard.num_rows]})


def manifest_costs(rows: int) -> dict[str, float]:
    """What the driver's list of images costs per million of them."""
    rng = np.random.default_rng(0)
    uris = [
        f"s3://archive/line{number % 50:02d}/2026-11-20/cam1/{number:012d}.jpg"
        for number in rng.permutation(rows)
    ]
    manifest = pa.table(
        {
            "uri": uris,
            "group": [uri[13:19] for uri in uris],
            "size": rng.integers(10**5, 10**6, rows),
            "version_tag": [f"{number:032x}" for number in rng.integers(0, 2**62, rows)],
        }
    )
    seconds = {}
    started = time.perf_counter()
    manifest = sort_images(manifest)
    seconds["sorting"] = time.perf_counter() - started
    started = time.perf_counter()
    shards = [
        shard_table(manifest, *shard) for shard in enumerate(shard_rows(manifest, SHARD_IMAGES))
    ]
    seconds["cutting into shards"] = time.perf_counter() - started
    with tempfile.NamedTemporaryFile() as file:
        pq.write_table(manifest, file.name)
        stored = os.path.getsize(file.name)
    millions = rows / 1e6
    return {
        "rows": rows,
        "MB in memory per million": manifest.nbytes / 1e6 / millions,
        "MB of Parquet per million": stored / 1e6 / millions,
        "shards": len(shards),
        **{f"{name}, s per million": value / millions for name, value in seconds.items()},
    }


def object_store_costs(images: int, n_features: int | str) -> dict[str, float]:
    """What a group of so many images puts into the object store, against its pixels as uint8."""
    with tempfile.TemporaryDirectory() as directory:
        weights = random_trunk(Path(directory) / "resnet18.pth")
        spec, _ = new_spec(ModelOptions(weights=weights, n_features=n_features), "bfloat16")
    height, width = spec.preprocessing.size
    pixels = 3 * height * width * images
    state = 4 * spec.grid.state_size
    together = images_per_partial(images, 1, spec)
    partials = -(-images // together)
    merges = max(0, -(-(partials - 1) // (FAN_IN - 1)))
    distances = 4 * spec.grid.cells[0] * images
    return {
        "images": images,
        "channels": sum(spec.grid.channels),
        "state, MB": state / 1e6,
        "images in a partial sum": together,
        "fit, bytes per byte of pixels": 1 + state * (partials + 2 * merges) / pixels,  # float64
        "score, bytes per byte of pixels": 1 + distances / pixels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--actors", nargs="+", type=int, default=ACTORS)
    parser.add_argument("--shards", type=int, default=16, help="per actor")
    parser.add_argument("--seconds", type=float, default=2.0, help="that an actor takes for one")
    parser.add_argument("--manifest", type=int, default=10**6, help="rows of one to measure")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    arguments = parser.parse_args()
    rows = [manifest_costs(arguments.manifest)]
    rows += [object_store_costs(10**6, n_features) for n_features in (100, "all")]
    for row in rows:
        print(json.dumps(row), flush=True)
    with cluster():
        for actors in arguments.actors:
            rows.append(measure(actors, arguments.shards * actors, arguments.seconds))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


@contextmanager
def cluster() -> Iterator[None]:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(NODES):
        nodes.add_node(num_cpus=SLOTS // NODES, object_store_memory=10**8)
    ray.init(nodes.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


def measure(actors: int, shards: int, seconds: float) -> dict[str, float]:
    """Time from the first finished shard on, against what the actors alone would take."""
    uris = [f"s3://archive/line/{number:08d}.jpg" for number in range(SHARD_IMAGES)]
    tables = [
        pa.table({"shard": pa.array([n] * SHARD_IMAGES, pa.int64()), "uri": uris})
        for n in range(shards)
    ]
    finished = []
    before, started = time.process_time(), time.perf_counter()
    with data_context(preserve_order=False):
        written = (
            ray.data.from_blocks(tables)
            .map_batches(
                decode,
                batch_size=None,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=min(shards, SLOTS // 4)),
                num_cpus=0.25,
            )
            .map_batches(
                SleepingActor,
                fn_constructor_args=[seconds],
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=actors),
                num_cpus=0.5,
            )
            .map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
        )
        with rows_of(written) as rows:
            for _ in rows:
                finished.append(time.perf_counter())
    # from when all actors have worked once, to when the first of them has nothing left
    first, last = finished[actors - 1], finished[-actors]
    rate = (len(finished) - 2 * actors + 1) / (last - first)
    driver = (time.process_time() - before) / shards
    return {
        "actors": actors,
        "shards": shards,
        "shards/s": rate,
        "busy": rate * seconds / actors,
        "driver ms per shard": 1000 * driver,
        "driver us per image": 1e6 * driver / SHARD_IMAGES,
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
