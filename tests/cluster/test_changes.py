"""Machines that join and leave during a job, which is kept running by holding its requests."""

import pytest

import padim_ray
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.cluster.conftest import DECODES, HAS_GPU, MODEL
from tests.cluster.drivers import running, wait_for
from tests.cluster.whereabouts import ask_where
from tests.faults.report import Differences, compare_models, compare_results, read_results

pytestmark = pytest.mark.cluster


def test_no_image_is_lost_when_a_node_joins_and_vanishes(
    cluster, job, proxy, store, many, add_machine, unplug, tmp_path
):
    first, log = cluster.nodes[1].machine.address, tmp_path / "log"
    with (
        proxy.holding("/(bolt|nut)/gaussian-") as beginning,
        proxy.holding("/(pin|ring)/gaussian-") as end,
        running(cluster, job(cluster, "score", "s3://out/joined"), log) as driver,
    ):
        wait_for(driver, lambda: first in beginning.clients)
        joined = cluster.add_node(add_machine(), HAS_GPU)
        wait_for(driver, lambda: joined.machine.address in beginning.clients)
        beginning.release()
        wait_for(driver, lambda: {first, joined.machine.address} <= end.clients)
        ran = [one for one in ask_where(cluster) if one.address == joined.machine.address]
        unplug(joined.machine)
        # its actor would wait with its calls for this GPU or the other one
        wait_for(driver, lambda: "room for an actor of a lost node" in log.read_text())
        end.release()
    assert driver.returncode == 0, log.read_text()
    assert all(one.is_of_actor for one in ran)
    assert "FINISHED" in {one.state for one in ran if one.name.endswith(".submit")}
    found = compare_results(read_results(many), read_results(store.root / "out/joined"))
    assert found == Differences()
    cluster.remove(joined)


def test_no_image_is_lost_when_a_decoding_node_vanishes(
    cluster, job, proxy, store, many, weights, add_machine, unplug, tmp_path
):
    leaving, log = cluster.add_node(add_machine(), DECODES), tmp_path / "log"
    with (
        proxy.holding("many/(pin|ring)/") as end,
        running(cluster, job(cluster, "fit", "s3://out/left"), log) as driver,
    ):
        wait_for(driver, lambda: leaving.machine.address in end.clients)
        unplug(leaving.machine)
        end.release()
    assert driver.returncode == 0, log.read_text()
    padim_ray.fit(
        **{"images": "s3://many/{group}/test/*", "model": "s3://out/one-node/many-model"},
        **{"weights": weights, "storage_options": store.options, **MODEL},
    )
    places = (store.root / "out" / name for name in ("one-node/many-model", "left"))
    versions = (open_version(Location.of(str(place))) for place in places)
    assert compare_models(*versions) == Differences()
    cluster.remove(leaving)
