"""Jobs that read a model keep `prune` from deleting the version that they read."""

import pytest

from padim_ray import PadimModel
from padim_ray.model.history import prune
from padim_ray.model.layout import published_numbers
from padim_ray.pipeline.jobs.score import scoring_job
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.storage.location import Location
from tests.model.test_padim_model import images


class ListedEnough(Exception):
    """Ends the job before it starts Ray."""


def test_a_version_can_not_be_pruned_from_the_moment_at_which_a_job_lists_its_images(
    weights, tmp_path
):
    model = PadimModel(weights=weights, image_size=32, n_features=12, precision="float32")
    model.update(images(0, 6, 32), group="bolt")
    root = Location.of(str(tmp_path / "model"))
    for _ in range(3):
        model.save(root.uri)
    options = ScoreOptions(
        images=f"{tmp_path}/*.png", model=f"{root.uri}@1", out=str(tmp_path / "out")
    )

    def list_images(_):
        assert prune(root, keep=1) == [2]
        raise ListedEnough

    with pytest.raises(ListedEnough), scoring_job("score", options, list_images):
        pass
    assert published_numbers(root) == [1, 3]
    assert prune(root, keep=1) == [1]
    assert not (tmp_path / "out").exists()
