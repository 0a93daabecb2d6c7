"""A version that is being written: its files, and the check that all of them are there."""

import pytest

from padim_ray import ModelError
from padim_ray.model import layout
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.draft import DraftVersion
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images

MOMENTS = [f"moments-{shard:05d}-of-00002.safetensors" for shard in (0, 1)]


@pytest.fixture(params=["gaussian", "shared"])
def written(request, weights, tmp_path, monkeypatch):
    """A draft of two shards with one group, and the group's directory."""
    options = ModelOptions(weights=weights, image_size=(32,), n_features=9, density=request.param)
    spec, state_dict = new_spec(options, "float32")
    monkeypatch.setattr(layout, "SHARD_BYTES", -(-spec.density.state_bytes(spec.grid) // 2))
    detector = Detector(spec, state_dict, "cpu")
    statistics = detector.add_(detector.empty_statistics(), detector.embed(images(0, 4, 32)))
    fitted = fit_density(spec, statistics)
    draft = DraftVersion.of(Location.of(str(tmp_path)), 3, spec)
    for shard, run in enumerate(state_shards(spec)):
        draft.save_statistics("bolt", shard, statistics.cells(*run))
        if shard < draft.density_shards:
            draft.save_density("bolt", shard, fitted.cells(*run))
    return draft, tmp_path / "versions/000003/groups/bolt"


def test_a_group_has_a_file_for_every_shard(written):
    draft, directory = written
    densities = {
        "gaussian": [f"gaussian-{shard:05d}-of-00002.safetensors" for shard in (0, 1)],
        "shared": ["shared-00000-of-00001.safetensors"],  # the same at all cells
    }[draft.spec.density.kind]
    assert sorted(path.name for path in directory.iterdir()) == sorted([*MOMENTS, *densities])
    assert draft.shards == 2 and draft.density_shards == len(densities)
    draft.check_written("bolt")


def test_a_file_that_only_another_machine_has_is_named(written):
    draft, directory = written
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ModelError, match=rf"{path.name}.* storage that all nodes share"):
            draft.check_written("bolt")
        path.write_bytes(content)
