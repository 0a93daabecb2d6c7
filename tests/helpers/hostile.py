"""A small model on disk to damage, and a function that reads all of it."""

from contextlib import contextmanager

import pyarrow as pa
import pytest

from padim_ray import ModelError, PadimModel
from padim_ray.model.layout import version_location
from padim_ray.model.rounds import Round
from padim_ray.model.version import open_version
from padim_ray.runs.job_record import JobRecord
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

BOLT = "versions/000001/groups/bolt"
GAUSSIAN = f"{BOLT}/gaussian-00000-of-00001.safetensors"
MOMENTS = f"{BOLT}/moments-00000-of-00001.safetensors"
DESCRIPTION = "versions/000001/model.json"
MANIFEST = "versions/000001/manifest-0123456789abcdef.parquet"
JOB, LISTED = "versions/000001/job.json", "versions/000001/listed.parquet"
ROUND, FAILURES = "versions/000001/rounds/000001.json", "versions/000001/rounds/000001.parquet"


def save_small_model(weights, directory):
    """Save a model with one calibrated group of six images, and its job's record and last round."""
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    model.update(images(0, 6, 32), group="bolt")
    model.calibrate(images(0, 6, 32), group="bolt")
    model.save(str(directory))
    (manifest,) = (directory / MANIFEST).parent.glob("manifest-*")
    manifest.rename(directory / MANIFEST)  # a name that tests know
    description = directory / DESCRIPTION
    text = description.read_text().replace(manifest.name, (directory / MANIFEST).name)
    description.write_text(text)
    version = Location(str(directory)) / "versions/000001"
    listed = pa.table({"uri": ["a", "b"], "group": ["bolt", "bolt"]})
    identity = {"job": "fit", "calibration_images": 6, "seed": 42, "layers": ["layer1"]}
    JobRecord(identity, {"precision": "float32"}, listed).write(version)
    Round(1, 6).commit(version, {"c": "decode: empty file"})
    return directory


def read_everything(directory, *, trunk=False):
    version = open_version(Location.of(str(directory)))
    place = version_location(version.root, version.number)
    JobRecord.read(place, version.root)
    Round.latest(place, version.root).read_failures(place, version.root)
    version.load_manifest()
    for group in version.groups:
        version.load_statistics(group)
        version.load_density(group)
        version.load_calibration(group)
    if trunk:
        version.load_trunk_weights()


@contextmanager
def replaced(file, data):
    """Replace a file's content within the context."""
    original = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.unlink()
        file.write_bytes(original)


def assert_refused(directory, name, data, match=None, **options):
    with replaced(directory / name, data), pytest.raises(ModelError, match=match) as error:
        read_everything(directory, **options)
    assert len(str(error.value)) < 2000
    assert str(directory) in str(error.value)
