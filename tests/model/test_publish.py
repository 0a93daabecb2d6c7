"""Publishing a version from several processes at once: one succeeds, and the others change nothing.

The S3 server honours conditional writes, as AWS does.
"""

import json
import multiprocessing
import secrets

import pyarrow as pa
import pytest

from padim_ray import PadimModel
from padim_ray.errors import ModelError
from padim_ray.images.manifest import restore_manifest
from padim_ray.model.layout import version_location
from padim_ray.model.publish import publish
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.faults.proxy import FaultProxy
from tests.model.test_padim_model import images

PUBLISHERS, ROUNDS = 3, 4


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path, weights):
    """A model of one version, two groups of 6 and 4 images."""
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    model.update(images(0, 6, 32), group="bolt")
    model.update(images(1, 4, 32), group="nut")
    if request.param == "disk":
        model.save(str(tmp_path))
        yield Location.of(str(tmp_path))
        return
    with FaultProxy(request.getfixturevalue("s3")) as proxy:
        place = Location.of(f"s3://publish-{secrets.token_hex(4)}", proxy.options)
        place.fs.mkdir(place.path)
        model.save(place.uri, place.options)
        yield place


def manifest_of(name):
    return pa.table({"uri": [f"{name}-{row}" for row in range(8)], "group": ["bolt"] * 8})


def publish_with_others(root, name, barrier, outcomes):
    """Publish one version after the other, each at the same time as the others."""
    version, outcome = open_version(root), []
    for number in range(2, 2 + ROUNDS):
        barrier.wait()
        try:
            publish(root, number, version.spec, version.groups, manifest_of(name), name)
            outcome.append("published")
        except ModelError as error:
            assert "was published by another job meanwhile" in str(error)
            outcome.append("refused")
    outcomes.put((name, outcome))


def test_of_publishers_at_the_same_moment_one_wins_and_the_others_change_nothing(root):
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(PUBLISHERS), context.Queue()
    processes = [
        context.Process(target=publish_with_others, args=(root, f"job-{index}", barrier, outcomes))
        for index in range(PUBLISHERS)
    ]
    for process in processes:
        process.start()
    by_name = dict(outcomes.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for index in range(ROUNDS):
        (winner,) = [name for name, all_ in by_name.items() if all_[index] == "published"]
        version = open_version(root, index + 2)
        assert version.load_manifest().equals(restore_manifest(manifest_of(winner)))
        content = json.loads((version_location(root, index + 2) / "model.json").read())
        assert content["why"] == winner
        files = version_location(root, index + 2).list_files()
        assert sorted(file.name for file in files) == sorted([version.manifest, "model.json"])


def test_a_publisher_that_comes_late_changes_nothing(root):
    version = open_version(root)
    before = {file.uri: file.read() for file in root.list_files()}
    with pytest.raises(ModelError, match="was published by another job meanwhile"):
        publish(root, 1, version.spec, version.groups, manifest_of("late"), "late")
    assert {file.uri: file.read() for file in root.list_files()} == before


def test_what_a_killed_publisher_left_is_deleted_before_the_next_one_publishes(root):
    place = version_location(root, 2)
    (place / "manifest-0123456789abcdef.parquet").write_table(manifest_of("killed"))
    model = PadimModel.load(root.uri, root.options)
    assert model.save(root.uri, root.options) == 2
    manifests = [file.name for file in place.list_files() if file.name.startswith("manifest")]
    assert manifests == [open_version(root, 2).manifest]
