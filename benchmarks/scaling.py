"""Costs of the driver and Ray's scheduler with 1 to 64 actors: `python -m benchmarks.scaling`.

A cluster of several node processes on this machine runs the scoring pipeline's shape (shards,
decoding tasks, a pool of actors, writing tasks) without the work: decoding makes tiny blocks, the
trunk sleeps. The rest is bookkeeping; its CPU time per shard limits how many actors one driver can
keep busy. Before that, this measures the memory of the list of images and of partial sums, and how
real work scales from one core with one actor to all cores.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.cluster_utils import Cluster
from ray.data import ActorPoolStrategy, TaskPoolStrategy

import padim_ray
from benchmarks.archive import ARCHIVES, many_images, random_trunk
from benchmarks.jobs import write_manifest
from benchmarks.timing import steady_rate
from padim_ray.images.manifest import sort_images
from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.model.spec import new_spec
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.planning.batches import images_per_batch, images_per_shard
from padim_ray.planning.forecast import State, distance_bytes, image_bytes
from padim_ray.planning.sums import count_sums
from padim_ray.runs.options.fit import VersionOptions
from padim_ray.runs.options.model import ModelOptions

SHARD_IMAGES = 256
NODES = 4
SLOTS = 96  # logical CPUs of all nodes; the tasks hardly compute
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
    """Memory and time of the driver's list of images, per million images."""
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
    """Bytes that a group of `images` puts into the object store, per byte of uint8 pixels."""
    with tempfile.TemporaryDirectory() as directory:
        weights = random_trunk(Path(directory) / "resnet18.pth")
        spec, _ = new_spec(ModelOptions(weights=weights, n_features=n_features), "bfloat16")
    pixels = image_bytes(spec) * images
    state, shard = State.of(spec), images_per_shard(images, spec.preprocessing)
    batch = images_per_batch(images, 1, spec, VersionOptions.round_images)
    sums = count_sums({"default": images}, shard, batch, VersionOptions.round_images)
    summed = sums.partials * state.statistics + sums.merges * state.merged
    return {
        "images": images,
        "channels": sum(spec.grid.channels),
        "state, MB": spec.density.state_bytes(spec.grid) / 1e6,
        "images in a partial sum": batch,
        "fit, bytes per byte of pixels": 1 + summed / pixels,
        "score, bytes per byte of pixels": 1 + distance_bytes(spec) / image_bytes(spec),
    }


def scoring_rates(cores: list[int], images: int, repeats: int) -> Iterator[dict[str, float]]:
    """Images/s of `score` at steady state by number of cores, with one single-threaded actor each.

    The numbers of cores take turns. Efficiency is relative to the rate per core of the first one.
    """
    with tempfile.TemporaryDirectory(prefix="padim-ray-bench-") as directory:
        root = Path(directory)
        files = many_images(root / "archive", images, *ARCHIVES["JPEG 700²"])
        sizes = (images // 3, images)
        manifests = [write_manifest(files[:size], root / f"{size}.parquet") for size in sizes]
        model, weights = str(root / "model"), random_trunk(root / "resnet18.pth")
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(_fit, (manifests[0], model, weights))
            for repeat in range(repeats):
                rates = {}
                for count in cores:
                    seconds = pool.apply(_score_on, (count, manifests, model, str(root / "out")))
                    rates[count] = steady_rate(sizes, seconds)
                    yield {
                        "repeat": repeat,
                        "cores and actors": count,
                        "images/s": rates[count],
                        "efficiency": rates[count] * cores[0] / (rates[cores[0]] * count),
                    }


def _fit(manifest: str, model: str, weights: str) -> None:
    padim_ray.fit(manifest=manifest, model=model, weights=weights, calibration_images=0)


def _score_on(cores: int, manifests: list[str], model: str, out: str) -> tuple[float, ...]:
    """Seconds per manifest on this process's first `cores` cores, without starting workers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    times = []
    for manifest in (manifests[0], *manifests):  # the first one starts the workers
        padim_ray.score(
            manifest=manifest,
            **{"model": model, "out": out, "actors": cores, "overwrite": True},
            **{"heatmaps": "none", "report_images": 0},
        )
        times.append(time.perf_counter())
    return tuple(np.diff(times).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--actors", nargs="*", type=int, default=ACTORS)
    parser.add_argument("--shards", type=int, default=16, help="per actor")
    parser.add_argument("--seconds", type=float, default=2.0, help="per shard and actor")
    parser.add_argument("--manifest", type=int, default=10**6, help="rows of the list of images")
    parser.add_argument("--cores", nargs="+", type=int, default=(1, 2), help="for real work")
    parser.add_argument("--images", type=int, default=1500, help="for real work; 0 skips it")
    parser.add_argument("--repeats", type=int, default=3, help="for real work")
    parser.add_argument("--out", type=Path, help="write the rows to this file as JSON")
    arguments = parser.parse_args()
    rows = [manifest_costs(arguments.manifest)]
    rows += [object_store_costs(10**6, n_features) for n_features in (100, "all")]
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.images:
        for row in scoring_rates(arguments.cores, arguments.images, arguments.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
    with cluster() if arguments.actors else nullcontext():
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
    """Rate while all actors are busy, their utilisation, and the driver's CPU time per shard."""
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
    # from when every actor has finished a shard until the first one runs out of work
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
