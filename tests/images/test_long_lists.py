"""A list of images whose URIs take more than 2 GiB: few rows, with URIs of a megabyte."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray.data

import padim_ray
from padim_ray import PadimModel
from padim_ray.images.manifest import read_manifest
from padim_ray.images.shards import sample_images, shard_rows, shard_table
from padim_ray.images.sources import hide_credentials, uris_to_fetch
from padim_ray.model.overlap import unite
from padim_ray.model.version import open_version
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.runs.job_record import LISTED, JobRecord
from padim_ray.runs.ranking import Scores
from padim_ray.scoring.decision import Decision
from padim_ray.storage.location import Location

pytestmark = pytest.mark.slow
IMAGES, TAIL = 2400, "x" * 1_000_000
MAX_MEMORY = 12 * 2**30  # bytes


def number(uri: str) -> int:
    return int(uri.removeprefix("s3://bucket/")[:6])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Location]:
    """The list as users write it, in no order; watches Arrow's memory."""
    path = tmp_path_factory.mktemp("long") / "manifest.parquet"
    shuffled = np.random.default_rng(0).permutation(IMAGES)
    kinds = {"uri": pa.string(), "group": pa.string(), "size": pa.int64()}
    schema = pa.schema(kinds | {"version_tag": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for some in np.split(shuffled, 6):
            uris = [f"s3://bucket/{image:06d}/{TAIL}" for image in some]
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
    signed = manifest["uri"].slice(1).combine_chunks()
    uris = pa.concat_arrays([pa.array(["https://host/a.png?sig=5ecret"], signed.type), signed])
    hidden = hide_credentials(manifest.set_column(0, "uri", uris))
    assert hidden["uri"][0].as_py() == "https://host/a.png?sig=***"
    assert hidden["uri"].slice(1).equals(manifest["uri"].slice(1))
    assert uris_to_fetch(hidden.slice(0, 1)) == ["https://host/a.png?sig=5ecret"]


@pytest.fixture(scope="module")
def model(manifest, weights, tmp_path_factory) -> str:
    """A model that says that it was fitted to these images."""
    root = tmp_path_factory.mktemp("model")
    small = PadimModel(weights=weights, image_size=64, n_features=10)
    small.update(np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), np.uint8))
    small.save(str(root))
    description = root / "versions/000001/model.json"
    content = json.loads(description.read_text())
    (entry,) = content["groups"].values()
    content["groups"] = {"g0": entry, "g1": entry | {"images": IMAGES}}
    description.write_text(json.dumps(content))
    fitted = manifest.append_column("status", pa.array(["fitted"] * IMAGES))
    Location.of(str(description.with_name("manifest.parquet"))).write_table(fitted)
    return str(root)


def test_a_model_s_images_are_found_among_those_of_an_update(model, file):
    summary = padim_ray.update(manifest=file.uri, model=model)
    assert (summary.listed, summary.skipped) == (0, IMAGES)


def test_a_model_s_images_are_found_among_those_to_forget(model, file):
    with pytest.raises(padim_ray.PadimError, match="Group 'g0' would be left with -1192 images"):
        padim_ray.forget(manifest=file.uri, model=model)


def test_models_that_share_images_are_united(model):
    manifest = open_version(Location.of(model)).load_manifest()
    union = unite(["a", "b"], [manifest, manifest.slice(0, 2)], [{}, {"g0": 1}])
    assert union.manifest.num_rows == IMAGES
    assert union.repeated["uri"].equals(manifest["uri"].slice(0, 2))


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
            assert [row["bytes"] for row in written] == [2 * (len(TAIL) + 19)] * 2
    for shard in last:
        part = pq.read_table(tmp_path / f"{shard['shard'][0].as_py()}.parquet")
        assert part["uri"].to_pylist() == shard["uri"].to_pylist()
        assert part.schema.field("uri").type == pa.string()
