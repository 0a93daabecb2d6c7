"""The forecasts of `plan` compared with real jobs, where no clock is needed."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import padim_ray
from padim_ray import cli
from padim_ray.images.manifest import read_manifest, sort_images
from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.model.publish import save_trunk_weights
from padim_ray.model.spec import new_spec
from padim_ray.model.version import open_version
from padim_ray.pipeline import graphs
from padim_ray.pipeline.cluster.session import data_context
from padim_ray.pipeline.graphs import partial_sums_of, scored_shards
from padim_ray.pipeline.merging import reducer
from padim_ray.pipeline.merging import tree as tree_module
from padim_ray.pipeline.merging.kept import KEPT
from padim_ray.pipeline.merging.tree import MergeTree, merge_sources
from padim_ray.planning import forecast
from padim_ray.planning.batches import embedding_bytes, images_per_batch, images_per_shard
from padim_ray.planning.plan import make_plan
from padim_ray.planning.resources import Node, plan_resources
from padim_ray.planning.sums import count_sums
from padim_ray.planning.survey import survey_manifest
from padim_ray.runs.options.fit import FitOptions
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.storage.location import Location
from tests.faults.proxy import FaultProxy

SMALL = {"image_size": 64, "n_features": 40, "precision": "float32"}
ROUND = 20


@pytest.fixture(scope="module")
def store(s3, archive):
    """The archive in a bucket, by way of a proxy that counts what is read."""
    s3.upload("planned", archive)
    s3.upload("planned-out")
    with FaultProxy(s3) as proxy:
        yield proxy


@pytest.fixture
def planned(capsys, store):
    """A function that runs `padim-ray plan --json` and returns what it prints."""

    def run(*arguments):
        given = ["--rate", "100", "--cpus", "2", "--storage-options", json.dumps(store.options)]
        with pytest.raises(SystemExit) as exit_:
            cli.main(["plan", "--json", *given, *map(str, arguments)])
        assert exit_.value.code == 0
        return json.loads(capsys.readouterr().out)

    return run


def read(store, prefix):
    return sum(count for path, count in store.read.items() if path.startswith(prefix))


@pytest.mark.usefixtures("ray_cluster")
def test_fit_and_score_take_what_plan_forecast(store, planned, s3, weights, monkeypatch):
    size = ("--image-size", 64, "--n-features", 40, "--precision", "float32")
    images = "s3://planned/{group}/train/good/*"
    told = planned("--images", images, *size, "--round-images", ROUND)
    fitting, _ = told["jobs"]
    done = Counter()
    merged, saved, added = merge_sources, reducer.save_unfinished, MergeTree.add
    monkeypatch.setattr(
        tree_module,
        "merge_sources",
        lambda density, parts, share: (
            done.update(merges=len(parts) > 1) or merged(density, parts, share)
        ),
    )
    monkeypatch.setattr(reducer, "save_unfinished", lambda *a: done.update(saves=1) or saved(*a))
    monkeypatch.setattr(MergeTree, "add", lambda *a: done.update(sums=1) or added(*a))
    store.read.clear()
    fitted = padim_ray.fit(
        images=images,
        model="s3://planned-out/model",
        weights=weights,
        round_images=ROUND,
        storage_options=store.options,
        **SMALL,
    )
    assert told["images"] == fitted.listed == fitting["images"]
    assert read(store, "planned/") == fitting["read_bytes"]
    assert (done["sums"], done["merges"]) == (fitting["partial_sums"], fitting["merges"]) == (3, 1)
    assert done["saves"] == count_sums({"bolt": 24, "nut": 15}, 64, ROUND, ROUND).saves == 1
    groups = s3.root / "planned-out/model/versions/000001/groups"
    stored = sum(path.stat().st_size for path in groups.rglob("*.safetensors"))
    assert fitting["state_bytes"] <= stored <= fitting["state_bytes"] + 4 * 2048
    everything = sum(
        path.stat().st_size for path in (s3.root / "planned-out/model").rglob("*") if path.is_file()
    )
    assert everything <= fitting["state_bytes"] + fitting["written_bytes"] + 8 * 4096

    images = "s3://planned/{group}/test/{defect}/*"
    told = planned("--images", images, "--model", "s3://planned-out/model")
    _, scoring = told["jobs"]
    assert told["features"]["channels"] == 40 and not told["warnings"]
    store.read.clear()
    padim_ray.score(
        images=images,
        model="s3://planned-out/model",
        out="s3://planned-out/run",
        storage_options=store.options,
        heatmaps="none",
        report_images=0,
    )
    assert read(store, "planned/") == scoring["read_bytes"]
    loaded = sum(n for path, n in store.read.items() if "/gaussian-" in path)
    assert scoring["state_bytes"] <= loaded <= scoring["state_bytes"] + 2 * 2048
    results = s3.root / "planned-out/run/results"
    assert sum(path.stat().st_size for path in results.iterdir()) <= scoring["written_bytes"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_object_store_holds_what_plan_forecast(archive, weights, tmp_path):
    spec, state_dict = new_spec(
        FitOptions(images="a/*", model="m", weights=weights, **SMALL).model_options, "float32"
    )
    root = Location.of(str(tmp_path / "model"))
    save_trunk_weights(root, state_dict)
    files = sorted((archive / "bolt/train/good").iterdir())
    # Ray Data counts rows, not files: some images stand for many
    uris = [str(files[row % len(files)]) for row in range(600)]
    manifest = pa.table({"uri": uris, "group": ["bolt"] * 440 + ["nut"] * 160})
    for name, kind in (("size", pa.int64()), ("version_tag", pa.string())):
        manifest = manifest.append_column(name, pa.nulls(600, kind))
    keep = np.arange(600) % 3 == 0
    manifest = manifest.append_column("keep", pa.array(keep))
    options = FitOptions(images="a/*", model="m", weights=weights, round_images=260, **SMALL)
    cluster = plan_resources([Node(2)], actors=2)
    parts = partial_sums_of(manifest, spec, root, options, cluster)
    blocks = [ray.get(block) for blocks in parts for block in blocks]
    shard = images_per_shard(600, spec.preprocessing)
    batch = images_per_batch(600, 2, spec, 260)
    assert batch == 256 == 2 * shard
    groups = {"bolt": 440, "nut": 160}
    sums = count_sums(groups, shard, batch, 260)
    shards = [shard for block in blocks for shard in block["shard"].to_pylist()]
    assert sums.partials == len(shards) - shards.count(KEPT) == 5
    predicted = sums.partials * forecast.State.of(spec).statistics
    predicted += keep.sum() * (manifest.nbytes / 600 + embedding_bytes(spec))
    assert sum(block.nbytes for block in blocks) == pytest.approx(predicted, rel=0.02)

    with data_context(preserve_order=True):
        tables = [shard_table(manifest, *s) for s in enumerate(shard_rows(manifest, shard))]
        decoded = graphs._decoded(tables, spec, options, cluster).materialize()
    row = manifest.nbytes / 600 + forecast.ROW_BYTES
    predicted = 600 * (row + forecast.image_bytes(spec))
    assert decoded.size_bytes() == pytest.approx(predicted, rel=0.01)


@pytest.mark.usefixtures("ray_cluster")
def test_scored_blocks_are_as_large_as_plan_forecast(store):
    version = open_version(Location.of("s3://planned-out/model", store.options))
    files = sorted((store.server.root / "planned/bolt/test/good").iterdir())
    manifest = pa.table({"uri": [str(file) for file in files], "group": ["bolt"] * len(files)})
    for name, kind in (("size", pa.int64()), ("version_tag", pa.string())):
        manifest = manifest.append_column(name, pa.nulls(len(files), kind))
    options = FitOptions(images="a/*", model="m")
    cluster = plan_resources([Node(2)])
    with data_context(preserve_order=True):
        table = shard_table(manifest, 0, slice(0, len(files)))
        scored = scored_shards([table], version, options, cluster).materialize()
    row = manifest.nbytes / len(files) + forecast.ROW_BYTES + forecast.ACTOR_COLUMNS_BYTES
    predicted = len(files) * (row + forecast.distance_bytes(version.spec))
    assert scored.size_bytes() == pytest.approx(predicted, rel=0.02)


def inventory(rows, wide=200):
    """An object store's inventory, with a wide column that the survey doesn't need."""
    return pa.table(
        {
            "uri": [f"s3://planned/{row % 3}/{row:08d}.png" for row in range(rows)],
            "group": [f"line{row % 3}" for row in range(rows)],
            "size": pa.array([1000 + row for row in range(rows)], pa.int64()),
            "checksum": [f"{row * 7919:0{wide}d}" for row in range(rows)],
        }
    )


def test_a_survey_reads_only_two_columns_of_a_manifest(store):
    table = inventory(60_000)
    location = Location.of("s3://planned-out/inventory.parquet", store.options)
    with location.replaced_by() as path:
        pq.write_table(table, path, row_group_size=10_000, compression="none", use_dictionary=False)
    size = location.size()
    store.read.clear()
    found = survey_manifest(location, sample=5)
    assert found.groups == {f"line{n}": 20_000 for n in range(3)}
    assert found.bytes == sum(table["size"].to_pylist()) and found.sized == 60_000
    sampled = found.sample["uri"].to_pylist()
    assert len(set(sampled)) == 5 and set(sampled) <= set(table["uri"].to_pylist())
    # one of six row groups completely, and two narrow columns of the others
    assert read(store, "planned-out/inventory") < 0.3 * size
    whole = read_manifest(location)
    assert found.manifest_bytes == pytest.approx(whole.nbytes, rel=0.01)


def test_a_manifest_may_have_no_column_but_uri(tmp_path):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"uri": [f"/a/{n}.png" for n in range(7)]}), path)
    found = survey_manifest(Location.of(str(path)), sample=100)
    assert found.groups == {"default": 7} and (found.bytes, found.sized) == (0, 0)
    assert found.sample.num_rows == 7
    whole = sort_images(read_manifest(Location.of(str(path))))
    assert found.manifest_bytes == pytest.approx(whole.nbytes, rel=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"uri,group", "is not a Parquet file"), (None, "There is no manifest at")],
)
def test_a_file_that_is_no_manifest_is_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "list.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(padim_ray.PadimError, match=message):
        make_plan(PlanOptions(manifest=str(path)))


def test_a_plan_measures_here_and_warns(archive, tmp_path):
    """Images are fetched, decoded, fitted and scored with random weights."""
    root = tmp_path / "archive"
    shutil.copytree(archive / "bolt/test/good", root / "bolt")
    (root / "single").mkdir()
    (root / "single/broken.png").write_bytes(b"<html>")
    made = make_plan(
        PlanOptions(images=f"{root}/{{group}}/*", image_size=(64,), n_features=20, sample=7)
    )
    assert (made.images, made.groups) == (7, 2)
    assert made.bytes == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    rates = made.rates
    assert min(rates.decode, rates.fit, rates.score, rates.factorise) > 0
    assert all(job.hours > 0 for job in made.jobs)
    # for so few small images a fast processor may wait for the driver
    assert {job.bound for job in made.jobs} <= {"CPUs", "driver"}
    failing, small = made.warnings
    assert failing.startswith("1 of the 7 sampled images failed, the first with: decode: not a PNG")
    assert small == "A fit needs at least 2 images of each group; 'single' have fewer"


def test_plan_warns_of_gpus_that_are_too_small_or_starved(archive):
    options = {"images": f"{archive}/{{group}}/train/good/*", "gpus": 8, "cpus": 16}
    made = make_plan(PlanOptions(**options, rate=100_000, gpu_memory=0.5, image_size=(64,)))
    assert made.gpu_memory == 2**29 and made.plan.actors == 8
    fit, score, decoding = made.warnings
    assert fit.startswith("fit needs about") and score.startswith("score needs about")
    assert "which has 0.5 (given by --gpu-memory)" in score
    assert decoding.startswith("Decoding can't keep up: ")
    assert made.decode_cores_per_gpu == pytest.approx(100_000 / made.rates.decode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --images or --manifest"),
        ({"images": "a/*", "rate": 0}, "--rate must be above 0"),
        ({"images": "a/*", "gpus": -1}, "--gpus must not be negative"),
        ({"images": "a/*", "cpus": 0}, "--cpus must be at least 1"),
        ({"images": "a/*", "model": "m", "n_features": 3}, "--n-features is the model's: leave it"),
        ({"images": "a/*", "image_size": 100}, "not a multiple of 16"),
    ],
)
def test_mistakes_in_the_options_are_named(options, message):
    with pytest.raises(padim_ray.PadimError, match=message):
        make_plan(PlanOptions(**options))


def test_the_printed_plan_shows_every_figure(archive, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(
            f"plan --images {archive}/{{group}}/train/good/* --rate 50 --image-size 64".split()
        )
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "39 images in 2 groups" in shown and "448 channels" in shown
    for line in ("hours", "read from storage", "through the object store", "an actor's memory"):
        assert line in shown
    assert "nan" not in shown and "None" not in shown
