"""A fit says what its model takes on storage, and needs room for what is left of it."""

import logging
import re

import pytest

import padim_ray
from padim_ray.errors import PadimError, TooManyFailed
from padim_ray.storage.disk import disk_usage

pytestmark = pytest.mark.usefixtures("ray_cluster")

MODEL = {
    **{"image_size": 128, "n_features": 100, "precision": "float32", "calibration_images": 0},
    **{"stride": 4, "neighbourhood": 1},
}
UNITS = {"kB": 10**3, "MB": 10**6}


def announced(text):
    """The sizes that a fit has logged: per group, statistics, density, and of all groups."""
    (line,) = (line for line in text.splitlines() if "A group takes" in line)
    found = re.findall(r"([0-9.]+) (kB|MB)", line)
    return [float(size) * UNITS[unit] for size, unit in found]


def size_of(model, pattern):
    return sum(file.stat().st_size for file in (model / "versions/000001/groups").glob(pattern))


def test_a_fit_says_what_it_will_write_and_refuses_a_disk_without_room_for_it(
    archive, weights, disk, caplog
):
    directory, give_space = disk
    caplog.set_level(logging.INFO, "padim_ray")
    assert give_space("40m")  # the trunk takes 11, and the groups 36
    job = {"images": f"{archive}/{{group}}/train/good/*", "weights": weights, **MODEL}
    model = directory / "model"
    with pytest.raises(PadimError, match=r"needs [0-9.]+ MB more, .* has [0-9.]+ MB free: make"):
        padim_ray.fit(**job, model=str(model))
    assert not list(model.rglob("moments-*"))
    caplog.clear()
    assert give_space("100m")
    padim_ray.fit(**job, model=str(model))
    group, statistics, density, model_size = announced(caplog.text)
    assert size_of(model, "bolt/moments-*") == pytest.approx(statistics, rel=0.01)
    assert size_of(model, "bolt/gaussian-*") == pytest.approx(density, rel=0.01)
    assert size_of(model, "*/*") == pytest.approx(model_size, rel=0.01)
    assert model_size == pytest.approx(2 * group, rel=0.01)
    assert "groups to write: 2, with" in caplog.text


def test_a_fit_that_is_continued_needs_room_for_what_is_left_only(
    archive, weights, disk, tmp_path, caplog
):
    directory, give_space = disk
    caplog.set_level(logging.INFO, "padim_ray")
    for path in archive.glob("*/train/good/*"):
        copy = tmp_path / "images" / path.relative_to(archive)
        copy.parent.mkdir(parents=True, exist_ok=True)
        is_last = path.stem == "014" and path.suffix == ".jpg"
        copy.write_bytes(b"broken" if is_last else path.read_bytes())
    job = {"images": f"{tmp_path}/images/{{group}}/train/good/*", "weights": weights, **MODEL}
    job |= {"model": str(directory / "model"), "round_images": 4}
    assert give_space("200m")
    with pytest.raises(TooManyFailed):
        padim_ray.fit(**job, max_failed=0)
    group, statistics, _, model_size = announced(caplog.text)
    size, free = disk_usage(directory)
    room = group + statistics + 2 * 2**20  # one group is written, and a round of the other one
    assert room < model_size
    assert give_space(f"{int(size - free + room) // 1024}k")
    assert padim_ray.fit(**job, max_failed=1).failed == 1
