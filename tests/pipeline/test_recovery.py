"""Stages that end with an error: no actor stays alive."""

import gc
import traceback
from pathlib import Path

import numpy as np
import pytest
from ray._private.state import actors

import padim_ray
from padim_ray.errors import ModelError, TooManyFailed
from padim_ray.model.padim_model import PadimModel
from padim_ray.pipeline.cluster.ray_internals import POOL_ACTOR
from padim_ray.pipeline.cluster.recovery import until_done
from tests.faults.processes import wait_until

SMALL = {"image_size": 64, "n_features": 20, "precision": "float32"}


@pytest.fixture
def no_collection():
    """Disable the cycle collector, which may not run during a whole job."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pools_actors():
    """The actors of Ray Data's pools that are alive or starting."""
    return [
        actor
        for actor in actors().values()
        if actor["ActorClassName"].startswith(POOL_ACTOR) and actor["State"] != "DEAD"
    ]


@pytest.fixture
def model(weights, draw_image, tmp_path):
    model = PadimModel(weights=weights, **SMALL)
    model.update(
        np.stack([np.asarray(draw_image(index)) for index in range(4)]).transpose(0, 3, 1, 2)
    )
    model.save(str(tmp_path / "model"))
    return str(tmp_path / "model")


@pytest.fixture
def images(draw_image, monkeypatch, tmp_path):
    """Images of which the first is broken; actors are still busy when the job fails for it."""
    monkeypatch.setattr("padim_ray.planning.batches.MIN_SHARD_IMAGES", 2)
    for index in range(100):
        path = tmp_path / f"images/{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        draw_image(index).save(path)
    (tmp_path / "images/000.png").write_bytes(b"broken")
    return f"{tmp_path}/images/*"


def fit(images, model, weights):
    padim_ray.fit(images=images, model=f"{model}-2", weights=weights, max_failed=0, **SMALL)


def score(images, model, weights):
    padim_ray.score(images=images, model=model, out=f"{model}-run", max_failed=0)


def score_by_a_damaged_model(images, model, weights):
    (shard,) = Path(model).rglob("gaussian-*")
    shard.write_bytes(b"damaged")
    padim_ray.score(images=images, model=model, out=f"{model}-run")


@pytest.mark.parametrize("job", [fit, score, score_by_a_damaged_model])
def test_no_actor_outlives_its_stage_even_if_somebody_keeps_the_error(
    job, images, model, weights, ray_cluster, no_collection
):
    with pytest.raises((TooManyFailed, ModelError)) as kept:
        job(images, model, weights)
    assert kept.value.__traceback__
    wait_until(lambda: not pools_actors(), 30)


def test_an_exception_that_the_caller_is_handling_keeps_its_variables(ray_cluster):
    def fail():
        kept = "as it was"
        raise KeyError(kept)

    try:
        fail()
    except KeyError as error:
        with pytest.raises(ValueError, match="invalid literal") as raised:
            until_done(lambda: int("one"), progress=lambda: 0)
        assert raised.value.__context__ is error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        assert frame.f_locals == {"kept": "as it was"}
