"""A list of images whose URIs take more than 2 GiB: few rows, with URIs of a megabyte.

The URIs are random, because a file that decodes to a thousand times its size is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray.data

from padim_ray.images.manifest import TEXT, read_manifest
from padim_ray.images.shards import sample_images, shard_rows, shard_table
from padim_ray.images.sources import hide_credentials, uris_to_fetch
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.runs.job_record import LISTED, JobRecord
from padim_ray.runs.ranking import Scores
from padim_ray.scoring.decision import Decision
from padim_ray.storage.location import Location

pytestmark = pytest.mark.slow
IMAGES, LENGTH = 2400, 1_000_000
MAX_MEMORY = 8 * 2**30  # bytes


def number(uri: str) -> int:
    return int(uri.removeprefix("s3://bucket/")[:6])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Location]:
    """The list as users write it, in no order; watches Arrow's memory."""
    path = tmp_path_factory.mktemp("long") / "manifest.parquet"
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(IMAGES)
    kinds = {"uri": pa.string(), "group": pa.string(), "size": pa.int64()}
    schema = pa.schema(kinds | {"version_tag": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for some in np.split(shuffled, 6):
            uris = [f"s3://bucket/{image:06d}/{rng.bytes(LENGTH // 2).hex()}" for image in some]
            columns = {"group": [f"g{image % 2}" for image in some], "size": some}
            columns["version_tag"] = list(map(str, some))
            writer.write_table(pa.table({"uri": uris} | columns, schema))
    yield Location.of(str(path))
    assert pa.default_memory_pool().max_memory() < MAX_MEMORY


@pytest.fixture(scope="module")
def manifest(file) -> pa.Table:
    table = read_manifest(file)
    assert pc.sum(pc.binary_length(table["uri"])).as_py() > 2.2 * 2**30
    return table


EXPECTED = [*range(0, IMAGES, 2), *range(1, IMAGES, 2)]  # by group


def test_it_is_sorted(manifest):
    starts = pc.utf8_slice_codeunits(manifest["uri"], 0, 30).to_pylist()
    assert [number(uri) for uri in starts] == EXPECTED


def test_a_job_s_record_is_read_as_it_was_written(manifest, tmp_path):
    place = Location.of(str(tmp_path))
    JobRecord({}, {}, manifest).write(place)
    read = JobRecord.read(place)
    assert read.images.equals(manifest)
    assert read.with_images(manifest, "x").images is manifest
    assert pq.read_schema(tmp_path / LISTED).field("uri").type == pa.string()


def test_it_is_cut_into_shards_and_samples(manifest):
    shards = shard_rows(manifest, 500)
    scores = Scores(manifest, shards, {g: Decision.of(None, 0.1, 0.1, 1.0) for g in ("g0", "g1")})
    wanted = scores.by_shard(np.array([0, IMAGES - 1]))
    assert [number(table["source"][0].as_py()) for table in wanted] == [0, IMAGES - 1]
    assert [table["shard"][0].as_py() for table in wanted] == [0, len(shards) - 1]
    assert len(sample_images(manifest, 10, seed=0)) == 20


def test_its_credentials_are_hidden(manifest):
    name = "https://host/a.png?sig="
    first = pa.table({"uri": pa.array([f"{name}5ecret"], TEXT)})
    signed = pa.concat_tables([first, manifest.select(["uri"])])
    hidden = hide_credentials(signed)
    assert hidden["uri"][0].as_py() == f"{name}***"
    assert hidden["uri"].slice(1).equals(manifest["uri"])
    assert uris_to_fetch(hidden.slice(0, 1)) == [f"{name}5ecret"]


def write_part(directory: Path, shard: pa.Table) -> pa.Table:
    number = shard["shard"][0].as_py()
    Location.of(str(directory / f"{number}.parquet")).write_table(shard)
    return pa.table({"shard": [number], "bytes": [pc.sum(pc.binary_length(shard["uri"])).as_py()]})


@pytest.mark.usefixtures("ray_cluster")
def test_its_last_shards_pass_through_ray(manifest, tmp_path):
    shards = list(enumerate(shard_rows(manifest, 2)))
    last = [shard_table(manifest, *shard) for shard in shards[-2:]]
    with data_context(preserve_order=True):
        stage = ray.data.from_blocks(last).map_batches(
            lambda shard: write_part(tmp_path, shard), batch_size=None, batch_format="pyarrow"
        )
        with rows_of(stage) as written:
            assert [row["bytes"] for row in written] == [2 * (LENGTH + 19)] * 2
    for shard in last:
        part = pq.read_table(tmp_path / f"{shard['shard'][0].as_py()}.parquet")
        assert part["uri"].to_pylist() == shard["uri"].to_pylist()
        assert part.schema.field("uri").type == pa.string()
