"""Ray's private API that the pipelines use; these tests show what a new version breaks."""

import inspect
import subprocess
import sys

import pytest
import ray
import ray.data
from packaging.version import Version
from ray._private import state, worker
from ray.data import exceptions
from ray.data._internal import progress
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.operators import actor_pool_map_operator

from padim_ray.pipeline.cluster import ray_internals

TESTED = [(2, 60)]


def parameters(function):
    return set(inspect.signature(function).parameters)


def test_ray_has_a_version_that_was_tested():
    version = Version(ray.__version__)
    assert (version.major, version.minor) in TESTED, "see pyproject.toml's pin, and this file"


def test_dataset_has_map_batches_internal():
    wanted = {"fn", "batch_size", "batch_format", "compute", "fn_constructor_args", "num_gpus"}
    assert wanted <= parameters(ray.data.Dataset.map_batches_internal)


def test_dataset_has_iter_internal_ref_bundles():
    assert parameters(ray.data.Dataset.iter_internal_ref_bundles) == {"self"}


def test_private_state_lists_actors_of_a_job_in_a_state():
    assert {"job_id", "actor_state_name"} <= parameters(state.actors)


def test_the_core_worker_kills_actors():
    from ray._raylet import CoreWorker

    assert callable(CoreWorker.kill_actor)
    assert hasattr(worker, "global_worker")


def test_the_actors_of_pools_have_the_expected_class():
    assert actor_pool_map_operator._MapWorker.__name__ == "_MapWorker"
    source = inspect.getsource(actor_pool_map_operator)
    assert ray_internals.POOL_ACTOR.removesuffix("(") in source


@pytest.mark.parametrize("module", [streaming_executor_state, progress, exceptions])
def test_the_silenced_loggers_exist_in_ray(module):
    assert module.logger.name in ray_internals.NOISY_LOGGERS


@pytest.mark.usefixtures("ray_cluster")
def test_restarting_actors_and_killing_one_for_good():
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    assert not ray_internals.restarting_actors(job)

    @ray.remote(num_cpus=0, max_restarts=-1)
    class Actor:
        def ping(self) -> int:
            return 1

    actor = Actor.remote()
    assert ray.get(actor.ping.remote()) == 1
    ray_internals.kill_actor_for_good(actor._actor_id.hex())
    with pytest.raises(ray.exceptions.RayActorError):
        for _ in range(100):
            ray.get(actor.ping.remote(), timeout=30)


DRIVER = """
import os, sys
from padim_ray.pipeline.cluster.session import data_context, ray_session

with ray_session("local"):
    import pyarrow as pa, ray.data

    class Actor:
        def __call__(self, rows): return rows

    with data_context(preserve_order=True):
        rows = ray.data.from_blocks([pa.table({"a": [1]})]).map_batches(
            Actor, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1
        )
        assert rows.take_all() == [{"a": 1}]
    assert "RAY_BACKEND_LOG_LEVEL" not in os.environ
print("done", file=sys.stderr)
"""


@pytest.mark.ray
def test_a_job_says_nothing_of_rays_own_affairs():
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER], capture_output=True, text=True, check=True
    )
    assert ended.stderr == "done\n"
