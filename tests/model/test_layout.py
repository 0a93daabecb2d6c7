"""Names and numbers of a model's files."""

from dataclasses import replace

import pytest

from padim_ray import ModelError
from padim_ray.model import layout
from padim_ray.model.layout import (
    calibration_locations,
    check_number,
    current_number,
    is_published,
    next_number,
    published_numbers,
    shard_location,
    state_shards,
    trunk_location,
    version_location,
    version_numbers,
)
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions
from padim_ray.storage.location import Location


@pytest.fixture
def root(tmp_path):
    """A model of which versions 1 and 3 are published, and 3 is the current one."""
    for number in (1, 2, 3, 4):
        (tmp_path / f"versions/{number:06d}").mkdir(parents=True)
    for number in (1, 3):
        (tmp_path / f"versions/{number:06d}/model.json").write_text("{}")
    (tmp_path / "versions/notes").mkdir()
    (tmp_path / "CURRENT").write_text("000003\n")
    return Location.of(str(tmp_path))


@pytest.fixture(scope="module")
def spec(weights):
    return new_spec(ModelOptions(weights=weights, image_size=(64,)), "float32")[0]


def test_files_are_named_by_version_group_and_shard(root):
    version = f"{root.uri}/versions/000003"
    assert version_location(root, 3).uri == version
    shard = shard_location(root, 3, "bolt", "moments", 1, 12)
    assert shard.uri == f"{version}/groups/bolt/moments-00001-of-00012.safetensors"
    assert [each.uri for each in calibration_locations(root, 3, "bolt")] == [
        f"{version}/groups/bolt/calibration.parquet",
        f"{version}/groups/bolt/pixels.parquet",
    ]
    assert trunk_location(root, "ab12").uri == f"{root.uri}/trunks/ab12.safetensors"


def test_a_version_is_published_once_it_has_a_model_json(root):
    assert version_numbers(root) == [1, 2, 3, 4]
    assert published_numbers(root) == [1, 3]
    assert is_published(root, 3) and not is_published(root, 2)


def test_the_next_version_follows_the_last_published_one(root, tmp_path):
    assert next_number(root) == 4  # an unfinished fit has the number already, and continues
    assert next_number(Location.of(str(tmp_path / "none"))) == 1


def test_the_current_version_is_the_default(root, tmp_path):
    assert current_number(root) == check_number(root) == check_number(root, 3) == 3
    assert check_number(root, 1) == 1
    for unpublished in (0, 2, 4, 5):
        with pytest.raises(ModelError, match=f"no version {unpublished}; it has 1, 3"):
            check_number(root, unpublished)
    assert current_number(Location.of(str(tmp_path / "none"))) is None


def test_shards_cover_all_cells_and_are_small(spec, monkeypatch):
    assert state_shards(spec) == [(0, spec.grid.cells[-1])]
    limit = spec.density.state_bytes(spec.grid) // 5
    monkeypatch.setattr(layout, "SHARD_BYTES", limit)
    shards = state_shards(spec)
    assert [start for start, _ in shards[1:]] == [stop for _, stop in shards[:-1]]
    assert (shards[0][0], shards[-1][1]) == (0, spec.grid.cells[-1])
    assert len(shards) in (5, 6)


def test_the_number_of_shards_is_part_of_the_format(spec):
    """Earlier versions of padim-ray cut the statistics of these sizes into as many shards."""
    sizes = {(4, 256): 11, (4, 512): 44, (16, 256): 3, (16, 512): 9}
    for (stride, size), count in sizes.items():
        preprocessing = replace(spec.preprocessing, resize=(size, size))
        of_size = replace(spec, preprocessing=preprocessing, stride=stride)
        assert len(state_shards(of_size)) == count
