"""The jobs under faults, compared with undisturbed runs: no row is lost, repeated or wrong."""

import json
import re
import signal
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from benchmarks.timing import sample
from padim_ray.storage.location import Location
from tests.faults.cluster import Cluster
from tests.faults.killers import DriverKiller, Killer
from tests.faults.processes import kill_session, wait_until
from tests.faults.proxy import Faults
from tests.faults.report import Differences, read_results

SEED = 20261122
PAUSES = {"actor": (0, 8), "worker": (0, 3), "raylet": (0, 8)}  # seconds between kills
FAIL_POINTS = (
    "fit:round-data-written",
    "fit:round-committed",
    "fit:model-written",
    "fit:version-written",
    "score:part-written",
    "score:results-complete",
    "score:run-json-written",
)
LARGE_MODEL = (
    *("--image-size", 128, "--n-features", 200, "--precision", "float32"),
    *("--stride", 4, "--neighbourhood", 1),
)
SLOW_STORE = Faults(latency=0.15)  # slow enough for a commit to be interrupted
SMALL_STORE = 80_000_000  # bytes; Ray's minimum is 78,643,200

slow = pytest.mark.slow_faults
both_jobs = pytest.mark.parametrize("job", ["fit", "score"])


@both_jobs
def test_a_few_kills_change_no_row(stage, ledger, job):
    place = stage.new_place(f"quick-{job}")
    driver = DriverKiller(stage.progress(job, place), SEED, pause=(0, 2), most=1)
    kill_workers = Killer(stage.cluster, "worker", SEED, PAUSES["worker"], most=2)
    kill_actors = Killer(stage.cluster, "actor", SEED, PAUSES["actor"], most=1)
    with kill_workers, kill_actors:
        starts = stage.run(job, place, killer=driver, starts=4)
    found = stage.compare(job, place)
    kills = driver.kills + kill_workers.kills + kill_actors.kills
    ledger.add_kills(f"{job}: a few kills of driver, actors, workers", kills, found)
    assert starts[-1].code == 0, starts[-1].output
    assert kills["driver"] == 1 and kills.total() > 1
    assert not found


@slow
@both_jobs
@pytest.mark.parametrize("kind, wanted", [("actor", 6), ("worker", 8), ("raylet", 3)])
def test_killed_processes_change_no_row(stage, ledger, job, kind, wanted):
    found, kills, codes, output = Differences(), 0, [], ""
    for attempt in range(4):  # a single run may end too early
        place = stage.new_place(f"{job}-{kind}")
        with Killer(stage.cluster, kind, SEED + attempt, PAUSES[kind], wanted - kills) as killer:
            (run,) = stage.run(job, place)
        codes.append(run.code)
        output += run.output
        kills += killer.kills[kind]
        found += stage.compare(job, place)
        ledger.kills += killer.kills
        if kills == wanted or run.code:
            break
    ledger.add(f"{job}: SIGKILL of {kind}s", kills, found)
    assert not any(codes), output
    assert kills == wanted
    assert not found


@slow
@both_jobs
def test_a_driver_killed_and_restarted_changes_no_row(stage, ledger, job):
    place = stage.new_place(f"{job}-driver")
    driver = DriverKiller(stage.progress(job, place), SEED, pause=(0, 3), most=8)
    with stage.proxy.injecting(SLOW_STORE):
        starts = stage.run(job, place, killer=driver, starts=12)
    found = stage.compare(job, place)
    ledger.add_kills(f"{job}: SIGKILL of the driver, restarted until done", driver.kills, found)
    assert starts[-1].code == 0, starts[-1].output
    assert len(starts) == 1 + driver.kills.total() > 3
    assert not found


@slow
@both_jobs
def test_a_driver_terminated_and_restarted_changes_no_row(stage, ledger, job):
    place = stage.new_place(f"{job}-term")
    driver = DriverKiller(
        stage.progress(job, place), SEED, pause=(0, 3), most=2, number=signal.SIGTERM
    )
    starts = stage.run(job, place, killer=driver, starts=4)
    found = stage.compare(job, place)
    ledger.add(f"{job}: SIGTERM of the driver, restarted until done", driver.kills.total(), found)
    assert starts[-1].code == 0, starts[-1].output
    assert {start.code for start in starts[:-1]} <= {143, -signal.SIGTERM}
    assert not found


@slow
@both_jobs
@pytest.mark.parametrize("successor", ["finishes", "gives up"])
def test_a_job_that_was_stopped_until_another_took_over_changes_no_row(
    stage, ledger, job, successor
):
    place = stage.new_place(f"{job}-lost-claim")
    progress, soon = stage.progress(job, place), {"PADIM_RAY_LAPSE_SECONDS": "6"}
    logs = [stage.directory / f"{place.rpartition('/')[2]}-{name}.log" for name in "ab"]
    drivers = []
    try:
        with stage.proxy.injecting(SLOW_STORE):
            drivers += [stage.cluster.start_driver(stage.command(job, place), logs[0], soon)]
            wait_until(progress, 300)
            drivers[0].send_signal(signal.SIGSTOP)
        # on this machine others would see that it is there
        claim = Location.of(f"{place}/.claims/000001.json", stage.proxy.options)
        elsewhere = json.loads(claim.read()) | {"boot": "another machine"}
        claim.write(json.dumps(elsewhere).encode())
        # the cluster's CPUs are the stopped job's
        command = [
            "local" if word == stage.cluster.address else word for word in stage.command(job, place)
        ]
        drivers += [stage.cluster.start_driver(command, logs[1], soon)]
        if successor == "gives up":
            # until then the stopped job's workers write
            wait_until(lambda: not claim.exists(), 300)
            before = progress()
            wait_until(lambda: progress() != before, 300)
            drivers[1].send_signal(signal.SIGTERM)
        successors_code = drivers[1].wait(300)
        drivers[0].send_signal(signal.SIGCONT)
        code = drivers[0].wait(120)
    finally:
        for driver in drivers:
            kill_session(driver.pid)
    (last,) = stage.run(job, place)
    found = stage.compare(job, place)
    ledger.add(f"{job}: claim lost to a job that {successor}", int(code == 2), found)
    outputs = [log.read_text(errors="replace") for log in logs]
    assert successors_code == (0 if successor == "finishes" else 143), outputs[1]
    assert code == 2, outputs[0]
    assert f"Another job took over {place}, so this one stops" in outputs[0]
    assert "Traceback" not in outputs[0]
    assert last.code == 0, last.output
    assert not found


@slow
@both_jobs
def test_everything_killed_at_once_changes_no_row(stage, ledger, job):
    place = stage.new_place(f"{job}-storm")
    driver = DriverKiller(stage.progress(job, place), SEED + 1, pause=(0, 5), most=3)
    killers = [
        Killer(stage.cluster, kind, SEED + 1, (2, 12), most=most)
        for kind, most in (("actor", 3), ("worker", 3), ("raylet", 1))
    ]
    with stage.proxy.injecting(SLOW_STORE), killers[0], killers[1], killers[2]:
        starts = stage.run(job, place, killer=driver, starts=8)
    found = stage.compare(job, place)
    kills = sum((killer.kills for killer in killers), driver.kills)
    ledger.add_kills(f"{job}: SIGKILL of all kinds at once", kills, found)
    assert starts[-1].code == 0, starts[-1].output
    assert not found


@slow
@pytest.mark.parametrize("name", FAIL_POINTS)
def test_a_driver_killed_at_a_fail_point_and_restarted_changes_no_row(stage, ledger, name):
    job = name.partition(":")[0]
    place = stage.new_place(name.replace(":", "-"))
    starts = stage.run(job, place, starts=2, environment={"PADIM_RAY_FAIL_POINTS": name})
    found = stage.compare(job, place)
    ledger.add(f"SIGKILL at {name}", starts[0].code == -signal.SIGKILL, found)
    assert [start.code for start in starts] == [-signal.SIGKILL, 0], starts[-1].output
    assert not found


@slow
@both_jobs
def test_a_faulty_store_changes_no_row(stage, ledger, job):
    place = stage.new_place(f"{job}-store")
    with stage.proxy.injecting(Faults(slow_down=0.10, cut=0.05, hang=0.02)):
        (run,) = stage.run(job, place)
    found = stage.compare(job, place)
    for kind in ("503", "cut", "hang"):
        ledger.add(f"{job}: {kind} of the store, all at once", stage.proxy.injected[kind], found)
    assert run.code == 0, run.output
    assert all(stage.proxy.injected[kind] for kind in ("503", "cut", "hang"))
    assert not found


@slow
@both_jobs
def test_an_outage_of_the_store_changes_no_row(stage, ledger, job):
    place = stage.new_place(f"{job}-outage")
    progress = stage.progress(job, place)

    def cut_off():
        wait_until(progress, 300)
        stage.proxy.cut_off(30)

    interruption = threading.Thread(target=cut_off, daemon=True)
    interruption.start()
    (run,) = stage.run(job, place)
    found = stage.compare(job, place)
    ledger.add(f"{job}: outage of the store, 30 s", stage.proxy.injected["outage"], found)
    assert run.code == 0, run.output
    assert run.seconds > 30
    assert stage.proxy.injected["refused connection"]
    assert not found


@slow
@pytest.mark.parametrize(
    "job, images", [("fit", "^faults/[bn].*/train/.*[05][.]"), ("score", "^faults/nut/test/")]
)
def test_images_refused_for_longer_than_the_retries_are_not_lost(stage, ledger, job, images):
    place = stage.new_place(f"{job}-refused")
    with Cluster(environment={"PADIM_RAY_RETRY_SECONDS": "2"}) as cluster:
        impatient = replace(stage, cluster=cluster)
        with stage.proxy.injecting(Faults(slow_down=1, paths=images)):
            (stopped,) = impatient.run(job, place)
        refused = stage.proxy.injected["503"]
        (finished,) = impatient.run(job, place)
    found = stage.compare(job, place)
    ledger.add(f"{job}: images refused for longer than the retries", refused, found)
    assert stopped.code == 3, stopped.output
    told = r"images \(fetch: the storage failed: \d+\) could not be fetched"
    assert re.search(told, " ".join(stopped.output.split())), stopped.output
    assert refused
    assert finished.code == 0, finished.output
    assert not found


@slow
def test_a_model_that_is_updated_in_mid_run_changes_no_row(stage, ledger):
    model = stage.new_place("updated")
    (fitted,) = stage.run("fit", model)
    of_its_own = replace(stage, undisturbed={**stage.undisturbed, "fit": model})
    place = stage.new_place("score-updated")
    killing = {"PADIM_RAY_FAIL_POINTS": "score:part-written"}
    (killed,) = of_its_own.run("score", place, starts=1, environment=killing)
    (updated,) = of_its_own.run("update", model)
    (finished,) = of_its_own.run("score", place)
    found = stage.compare("score", place)
    ledger.add("score: model updated between two attempts", updated.code == 0, found)
    assert [fitted.code, killed.code, updated.code] == [0, -signal.SIGKILL, 0], updated.output
    assert finished.code == 0, finished.output
    assert "is 2; the run stays with version 1" in finished.output
    assert not found


def fill_after_first_round(directory, progress):
    wait_until(progress, 120)
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@slow
@pytest.mark.parametrize(
    "job, size, more", [("fit", "40m", ()), ("score", "4m", ("--heatmaps", "all", "--maps"))]
)
def test_a_full_disk_keeps_what_was_committed(stage, ledger, disk, job, size, more):
    directory, give_space = disk
    place = str(directory / job)
    assert give_space(size)
    filler = threading.Thread(
        target=fill_after_first_round, args=(directory, stage.progress(job, place))
    )
    if job == "fit":  # it would refuse to begin where its model doesn't fit
        filler.start()
    (stopped,) = stage.run(job, place, *more)
    committed = {row["uri"]: row["scored_at"] for row in read_results(directory / job)}
    assert give_space("400m")
    (finished,) = stage.run(job, place, *more)
    found = stage.compare(job, place)
    ledger.add(f"{job}: disk full", int("No space left" in stopped.output), found)
    assert stopped.code == 2, stopped.output
    assert "Error: Can't write" in stopped.output and "No space left" in stopped.output
    assert "Traceback" not in stopped.output
    assert finished.code == 0, finished.output
    assert not found
    if job == "score":
        rows = {row["uri"]: row["scored_at"] for row in read_results(directory / job)}
        assert 0 < len(committed) < len(rows)
        assert committed.items() <= rows.items()  # not scored again


@slow
def test_a_small_object_store_spills_and_changes_no_row(stage, ledger):
    large = replace(stage, model_options=LARGE_MODEL, undisturbed={})
    large.reference_place("fit")
    with Cluster(object_store_bytes=SMALL_STORE) as cluster, sample(cluster.spilled) as spilled:
        small = replace(large, cluster=cluster)
        place = small.new_place("spill")
        (run,) = small.run("fit", place)
    found = small.compare("fit", place)
    ledger.add("fit: objects spilled from a small object store", len(set(spilled)), found)
    assert run.code == 0, run.output
    assert spilled
    assert not found


@slow
def test_at_least_fifty_processes_were_killed(ledger):
    # by the tests above, which run first
    assert {"actor", "worker", "raylet", "driver"} <= set(ledger.kills)
    assert ledger.kills.total() >= 50
