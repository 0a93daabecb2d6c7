"""The test cluster and the killers themselves."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.killers import DriverKiller, Killer, run_until_done
from tests.faults.processes import PATIENCE, REPOSITORY, list_processes, wait_until

BUSY = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(max_retries=-1)
def count(number):
    time.sleep(0.5)
    return number

@ray.remote(max_restarts=-1, max_task_retries=-1)
class MapWorker:
    def double(self, number):
        time.sleep(0.5)
        return 2 * number

actors = [MapWorker.options(num_cpus=0.5).remote() for _ in range(2)]
results = [actors[number % 2].double.remote(count.remote(number)) for number in range(24)]
assert sum(ray.get(results)) == 2 * sum(range(24))
print(sum(node["Alive"] for node in ray.nodes()), "nodes")
"""

STEPS = """
import sys, time
from pathlib import Path
directory = Path(sys.argv[1])
for step in range(10):
    if not (directory / str(step)).exists():
        time.sleep(0.2)
        (directory / str(step)).touch()
"""


@pytest.mark.slow_faults
def test_killed_nodes_are_replaced_and_no_process_is_left(cluster, tmp_path):
    command = [sys.executable, "-c", BUSY, cluster.address]
    (undisturbed,) = run_until_done(cluster, command, tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output
    assert "3 nodes" in undisturbed.output
    kills = Counter()
    killers = [Killer(cluster, kind, 1, (0, 1), 2) for kind in ("actor", "worker", "raylet")]
    with killers[0], killers[1], killers[2]:
        (disturbed,) = run_until_done(cluster, command, tmp_path / "disturbed")
    for killer in killers:
        kills += killer.kills
    assert disturbed.code == 0, disturbed.output
    assert all(kills[kind] for kind in ("actor", "worker", "raylet")), kills
    cluster.restore()
    assert all(node.is_running and len(node.raylets()) == 1 for node in cluster.nodes)


OWNER = """
import time
from tests.faults.cluster import Cluster
with Cluster(workers=1) as cluster:
    print(cluster.directory, *(process.pid for process in cluster._started), flush=True)
    time.sleep(600)
"""


def test_a_stopped_cluster_leaves_no_process_and_no_file():
    with Cluster(workers=1) as cluster:
        sessions = [process.pid for process in cluster._started]
        assert all(list_processes(session) for session in sessions)
        cluster.nodes[0].raylets()[0].kill()
    assert not any(list_processes(session) for session in sessions)
    assert not cluster.directory.exists()


@pytest.mark.slow_faults
def test_a_cluster_whose_owner_is_killed_leaves_no_process_and_no_file():
    command = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    directory, *sessions = owner.stdout.readline().split()
    assert len(sessions) == 2
    assert all(list_processes(int(session)) for session in sessions)
    owner.kill()
    owner.wait()
    wait_until(lambda: not Path(directory).exists(), PATIENCE)
    assert not any(list_processes(int(session)) for session in sessions)


def test_a_driver_is_killed_at_times_that_follow_from_the_seed_and_repeated_until_done(
    cluster, tmp_path
):
    steps = tmp_path / "steps"
    steps.mkdir()
    killer = DriverKiller(lambda: len(list(steps.iterdir())), seed=3, pause=(0, 0.5), most=3)
    command = [sys.executable, "-c", STEPS, str(steps)]
    starts = run_until_done(cluster, command, tmp_path, killer=killer, starts=9)
    assert [start.code for start in starts] == [-9, -9, -9, 0]
    assert killer.kills == {"driver": 3}
    assert len(list(steps.iterdir())) == 10
