"""Jobs that read a version, and `prune` at the same time."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest

from padim_ray import ModelError, PadimModel
from padim_ray.model.history import prune
from padim_ray.model.layout import published_numbers
from padim_ray.model.readers import reading
from padim_ray.model.version import open_version
from padim_ray.storage.claim import claimed
from padim_ray.storage.heartbeat import describe_process, encode
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

READ = """
import sys
from padim_ray.model.readers import reading
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
with reading(open_version(Location.of(sys.argv[1]), 1), "score"):
    print("reading", flush=True)
    input()
"""
READ_AS_NOBODY = """
import logging, os, sys
from padim_ray.model.readers import reading
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
logging.basicConfig(level=logging.INFO)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
version = open_version(Location.of(sys.argv[1]), 1)
with reading(version, "score"):
    version.load_statistics("bolt")
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "1")


@pytest.fixture(scope="module")
def model(weights):
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    model.update(images(0, 6, 32), group="bolt")
    return model


@pytest.fixture
def root(model, place):
    """A model of three versions."""
    for _ in range(3):
        model.save(place.uri, place.options)
    return place


def read_everything(version):
    version.load_trunk_weights()
    version.load_manifest()
    version.load_statistics("bolt")
    version.load_density("bolt")


def leases(root):
    return [file.name for file in (root / ".readers").list_files()]


def test_a_version_stays_while_a_job_reads_it(root, caplog):
    version = open_version(root, 1)
    with reading(version, "score"):
        assert prune(root, keep=1) == [2]
        read_everything(version)
    assert f"Version 1 stays, because a score job reads it: process {os.getpid()}" in caplog.text
    assert leases(root) == []
    assert prune(root, keep=1) == [1]


def test_the_lease_of_a_killed_job_is_deleted(root):
    command = [sys.executable, "-c", READ, root.uri]
    if not root.is_local:
        (root / ".readers/000001-0123456789abcdef.json").write(
            encode(describe_process("score") | {"boot": "another machine"})
        )
    else:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout.readline() == "reading\n"
            assert prune(root, keep=1) == [2]
            reader.kill()
    assert len(leases(root)) == 1
    assert 1 in prune(root, keep=1)
    assert leases(root) == []


def test_a_reader_that_comes_while_prune_is_at_work_waits_for_it(root):
    version, is_reading = open_version(root, 1), threading.Event()

    def read():
        with reading(version, "score"):
            is_reading.set()

    reader = threading.Thread(target=read)
    with claimed(root, "prune"):
        reader.start()
        assert not is_reading.wait(2)
    reader.join()
    assert is_reading.is_set()


def test_a_version_that_was_deleted_meanwhile_is_named(root):
    version = open_version(root, 1)
    prune(root, keep=2)
    with pytest.raises(ModelError, match="has no version 1; it has 2, 3"), reading(version, "x"):
        pass
    assert leases(root) == []


def test_whoever_gets_to_read_a_version_can_read_all_of_it(model, tmp_path):
    root, outcomes = Location.of(str(tmp_path)), set()
    for _ in range(12):
        model.save(root.uri)
        model.save(root.uri)
        old, _ = published_numbers(root)[-2:]
        version, start = open_version(root, old), threading.Barrier(2)

        def delete(start=start):
            start.wait()
            prune(root, keep=1)

        pruner = threading.Thread(target=delete)
        pruner.start()
        start.wait()
        try:
            with reading(version, "score"):
                read_everything(version)
                outcomes.add("read")
        except ModelError as error:
            assert f"has no version {old};" in str(error)
            outcomes.add("refused")
        pruner.join()
    assert outcomes <= {"read", "refused"} and outcomes


def test_a_job_that_may_not_write_to_the_model_reads_it_unprotected(model):
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    directory = tempfile.mkdtemp()
    try:
        os.chmod(directory, 0o755)
        model.save(directory)
        result = subprocess.run(
            [sys.executable, "-c", READ_AS_NOBODY, directory],
            capture_output=True,
            text=True,
            env=os.environ | {"PADIM_RAY_LAPSE_SECONDS": "60"},
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("isn't protected from `prune`") == 1
        assert "permission denied" in result.stderr
        assert not os.path.exists(f"{directory}/.readers")
    finally:
        shutil.rmtree(directory)


def test_a_lease_is_not_written_through_a_link(model, tmp_path, caplog):
    model.save(str(tmp_path / "model"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model/.readers").symlink_to(tmp_path / "elsewhere")
    version = open_version(Location.of(str(tmp_path / "model")))
    with caplog.at_level(logging.INFO, "padim_ray"), reading(version, "score"):
        assert list((tmp_path / "elsewhere").iterdir()) == []
    assert ".readers is a link" in caplog.text
