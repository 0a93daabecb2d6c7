"""A small model on disk to damage, and a function that reads all of it."""

from contextlib import contextmanager

import pytest

from padim_ray import ModelError, PadimModel
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

BOLT = "versions/000001/groups/bolt"
GAUSSIAN = f"{BOLT}/gaussian-00000-of-00001.safetensors"
MOMENTS = f"{BOLT}/moments-00000-of-00001.safetensors"
DESCRIPTION = "versions/000001/model.json"
MANIFEST = "versions/000001/manifest-0123456789abcdef.parquet"


def save_small_model(weights, directory):
    """Save a model with one calibrated group of six images."""
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    model.update(images(0, 6, 32), group="bolt")
    model.calibrate(images(0, 6, 32), group="bolt")
    model.save(str(directory))
    (manifest,) = (directory / MANIFEST).parent.glob("manifest-*")
    manifest.rename(directory / MANIFEST)  # a name that tests know
    description = directory / DESCRIPTION
    text = description.read_text().replace(manifest.name, (directory / MANIFEST).name)
    description.write_text(text)
    return directory


def read_everything(directory, *, trunk=False):
    version = open_version(Location.of(str(directory)))
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
