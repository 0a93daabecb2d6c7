"""Hundreds of groups in one job, on actors that hold two of them."""

import json
import logging
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import padim_ray
from padim_ray import PadimModel
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

GROUPS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    for number in range(GROUPS):
        model.update(images(number, 3, size=32), group=f"{number:03d}")
    path = tmp_path_factory.mktemp("many")
    model.save(str(path / "model"))
    return path / "model"


def test_each_actor_loads_a_tiny_group_once(ray_cluster, model, tmp_path, weights, caplog):
    rng = np.random.default_rng(0)
    groups = [f"{number:03d}" for number in range(GROUPS) for _ in range(2)]
    uris = []
    for number, group in enumerate(groups):
        path = tmp_path / f"images/{group}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        uris.append(str(path))
    rows = list(zip(uris, groups, strict=True))
    random.Random(0).shuffle(rows)  # a manifest may come in any order
    manifest = tmp_path / "manifest.parquet"
    shuffled = {name: [row[i] for row in rows] for i, name in enumerate(("uri", "group"))}
    pq.write_table(pa.table(shuffled), manifest)
    version = open_version(Location.of(str(model)))
    size = version.load_density("000").nbytes
    job = {"manifest": str(manifest), "model": str(model), "threshold": 1.0, "heatmaps": "none"}
    with caplog.at_level(logging.INFO, "padim_ray"):
        padim_ray.score(**job, out=str(tmp_path / "two"), actors=2, group_memory=2 * size)
    run = json.loads((tmp_path / "two/run.json").read_text())
    loads = {
        group: (told["loads"], told["loading_actors"]) for group, told in run["groups"].items()
    }
    assert loads == {f"{number:03d}": (1, 1) for number in range(GROUPS)}
    assert f"Densities loaded {GROUPS} times for {GROUPS} groups" in caplog.text
    # one actor with room for one group only, so nothing is loaded ahead
    few = pa.table(shuffled).filter(pa.array([group < "010" for group in shuffled["group"]]))
    pq.write_table(few, manifest)
    padim_ray.score(**job, out=str(tmp_path / "one"), actors=1, group_memory=1)
    told = json.loads((tmp_path / "one/run.json").read_text())["groups"]
    assert {(each["loads"], each["loading_actors"]) for each in told.values()} == {(1, 1)}
    assert "--group-memory is 1, and one group's density takes" in caplog.text
    # the scores equal the library's, whatever the actors hold
    scores = pq.read_table(tmp_path / "two/results").to_pandas().set_index("uri")["score"]
    again = pq.read_table(tmp_path / "one/results").to_pandas().set_index("uri")["score"]
    np.testing.assert_array_equal(scores.loc[again.index], again)
    library = PadimModel.load(str(model))
    for uri, group in rows[:20]:
        pixels = np.asarray(Image.open(uri)).transpose(2, 0, 1)[None]
        expected = library.score(pixels, group=group).scores
        assert scores[uri] == pytest.approx(float(expected), rel=1e-3)
