import glob
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from padim_ray.errors import PadimError
from padim_ray.storage.claim import claimed
from padim_ray.storage.heartbeat import describe_process
from padim_ray.storage.location import Location

HOLD = """
import sys, time
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location
with claimed(Location.of(sys.argv[1]), "score") as claim:
    print("held", flush=True)
    for line in sys.stdin:
        (claim.root / "results/part").write(line.encode())
        print("written", flush=True)
"""
TAKEN_OVER = r"Another job took over .*, so this one stops"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "1")


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process that claims a directory, and writes what it is told."""
    processes = []

    def start(directory=tmp_path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def claims(place):
    return [file.name for file in (place / ".claims").list_files() if file.name[-5:] == ".json"]


def write_claim(place, number=1, **changes):
    """Write a claim as another job would have left it."""
    content = describe_process("fit") | changes
    (place / f".claims/{number:06d}.json").write(json.dumps(content).encode())


def test_one_job_holds_a_directory(place):
    with claimed(place, "score") as mine:
        mine.check()
        refusal = r"is being written by another score job: process \d+ on "
        with pytest.raises(PadimError, match=refusal), claimed(place, "fit"):
            pass
        mine.check()
    with claimed(place, "fit") as mine:
        mine.check()


def test_no_number_is_used_twice(place):
    numbers = []
    for _ in range(3):
        with claimed(place, "score") as mine:
            numbers.append(mine.number)
            assert claims(place) == [f"{mine.number:06d}.json"]
    assert numbers == sorted(set(numbers))
    assert len((place / ".claims").list_files()) == 1  # older ones are deleted


def test_of_many_jobs_that_try_at_once_one_gets_the_claim(tmp_path):
    place, start = Location.of(str(tmp_path)), threading.Barrier(8)

    def try_to_claim(_):
        start.wait()
        try:
            with claimed(place, "score") as mine:
                time.sleep(0.5)
                mine.check()
                return "held"
        except PadimError:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(try_to_claim, range(8)))
    assert sorted(outcomes) == ["held"] + ["refused"] * 7


def take_and_count(directory, rounds):
    """Claim a directory again and again, and append to a file what only a holder may."""
    place = Location.of(directory)
    for _ in range(rounds):
        try:
            with claimed(place, "score"):
                for word in ("enter", "leave"):
                    with open(f"{directory}/log", "a") as log:
                        log.write(f"{word} {os.getpid()}\n")
                    time.sleep(0.002)
        except PadimError as error:
            assert "is being written by another score job" in str(error)


def test_processes_that_come_and_go_never_hold_a_directory_together(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=take_and_count, args=(str(tmp_path), 60)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert not any(process.exitcode for process in processes)
    assert len(lines) > 20 and len({pid for _, pid in lines}) > 1
    for (entered, first), (left, second) in zip(lines[::2], lines[1::2], strict=True):
        assert (entered, left) == ("enter", "leave") and first == second


def test_a_killed_jobs_claim_on_this_machine_is_taken_over_at_once(tmp_path, hold, monkeypatch):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "60")
    place, holder = Location.of(str(tmp_path)), hold()
    with pytest.raises(PadimError, match=f"process {holder.pid} on "), claimed(place, "score"):
        pass
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with claimed(place, "score") as mine:
        mine.check()
        assert claims(place) == ["000002.json"]
    assert time.monotonic() - started < 10


def test_a_claim_of_another_machine_lapses_without_heartbeats(place):
    write_claim(place, boot="another machine")
    with claimed(place, "score") as mine:
        mine.check()
        assert claims(place) == ["000002.json"]


def test_a_claim_of_another_machine_with_heartbeats_is_respected(place):
    write_claim(place, boot="another machine", host="node7")
    done = threading.Event()

    def beat_on():
        beat = 0
        while not done.wait(0.2):
            beat += 1
            (place / ".claims/000001.beat").write(b"%d" % beat)

    thread = threading.Thread(target=beat_on)
    thread.start()
    try:
        with pytest.raises(PadimError, match="on node7"), claimed(place, "score"):
            pass
    finally:
        done.set()
        thread.join()


def test_a_job_that_holds_a_directory_for_longer_than_its_lapse_shows_that_it_is_alive(place):
    with claimed(place, "score") as mine:
        first = (place / ".claims/000001.json").read()
        elsewhere = json.dumps(json.loads(first) | {"boot": "another machine"}).encode()
        (place / ".claims/000001.json").write(elsewhere)
        for _ in range(2):
            with pytest.raises(PadimError, match="is being written"), claimed(place, "score"):
                pass
            time.sleep(0.6)
        mine.check()


def test_a_job_whose_claim_was_taken_over_neither_writes_nor_deletes(place):
    with claimed(place, "score") as mine:
        (mine.root / "a/there").write(b"first")
        there = json.loads((place / ".claims/000001.json").read())
        write_claim(place, number=2)  # as another job takes over
        (place / ".claims/000001.json").remove()
        time.sleep(0.1)
        for change in (
            mine.check,
            lambda: (mine.root / "a/there").write(b"second"),
            lambda: (mine.root / "new").create(b""),
            (mine.root / "a/there").remove,
            (mine.root / "a").remove_all,
            lambda: pickle.loads(pickle.dumps(mine.root / "a" / "there")).write(b"of a worker"),
        ):
            with pytest.raises(PadimError, match=TAKEN_OVER):
                change()
        write_claim(place, number=1)  # the number again, by yet another job
        with pytest.raises(PadimError, match=TAKEN_OVER):
            mine.check()
        (place / ".claims/000001.json").write(json.dumps(there).encode())
        mine.check()
        (place / ".claims/000001.json").remove()
    assert (place / "a/there").read() == b"first" and not (place / "new").exists()
    assert claims(place) == ["000002.json"]  # the other job's claim stays


@pytest.mark.parametrize("others", [1, 2])
def test_a_job_that_was_stopped_until_others_came_and_went_writes_nothing(tmp_path, hold, others):
    place, stopped = Location.of(str(tmp_path)), hold()
    write = f"{stopped.pid}\n"
    stopped.stdin.write(write)
    stopped.stdin.flush()
    assert stopped.stdout.readline() == "written\n"
    os.kill(stopped.pid, signal.SIGSTOP)
    claim = tmp_path / ".claims/000001.json"
    elsewhere = json.loads(claim.read_text()) | {"boot": "another machine"}
    claim.write_text(json.dumps(elsewhere))  # otherwise the process would be found here
    for number in range(others):
        with claimed(place, "score") as mine:
            (mine.root / "results/part").write(b"%d" % number)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stopped.stdin.write(write)
    stopped.stdin.close()
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait(30) == 1
    assert "so this one stops" in stopped.stderr.read()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_job_that_was_stopped_without_a_successor_goes_on(tmp_path, hold):
    stopped = hold()
    os.kill(stopped.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.stdin.write("late\n")
    stopped.stdin.close()
    assert stopped.wait(30) == 0, stopped.stderr.read()
    assert (tmp_path / "results/part").read_text() == "late\n"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"}', b"\xff", b'{"lapse": 1e99}'])
def test_a_damaged_claim_lapses(place, content, monkeypatch):
    monkeypatch.setattr("padim_ray.storage.heartbeat.MAX_LAPSE", 1.0)
    (place / ".claims/000001.json").write(content)
    with claimed(place, "score") as mine:
        mine.check()


def test_a_claim_leaves_no_empty_directories(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with claimed(Location.of(str(tmp_path / name)), "score"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_job_whose_directory_was_deleted_stops(tmp_path):
    with claimed(Location.of(str(tmp_path / "out")), "score") as mine:
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(PadimError, match=TAKEN_OVER):
            mine.check()
    assert not (tmp_path / "out").exists()


WRITE_AND_DIE = """
import os, signal, sys
import pyarrow as pa, pyarrow.parquet as pq
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location
table = pa.table({"score": [0.5] * 128})
with claimed(Location.of(sys.argv[1]), "score") as claim:
    (claim.root / ".staging/distances").write(b"to continue with")
    (claim.root / "results/part-000000.parquet").write_table(table)
    with (claim.root / "results/part-000001.parquet").replaced_by() as temporary:
        pq.write_table(table, temporary)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_no_file_among_the_results(tmp_path):
    out = tmp_path / "out"
    writer = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(out)])
    assert writer.returncode == -signal.SIGKILL
    results = out / "results"
    # hidden files, too: DuckDB and Polars count them
    files = glob.glob(f"{results}/**", recursive=True, include_hidden=True)
    assert sorted(files) == [f"{results}/", f"{results}/part-000000.parquet"]
    assert sum(pq.ParquetFile(file).metadata.num_rows for file in files[1:]) == 128
    assert list(out.rglob("*.tmp*"))  # a whole file that was about to be renamed
    with claimed(Location.of(str(out)), "score"):  # the run is continued
        assert not list(out.rglob("*.tmp*"))
        assert (out / ".staging/distances").exists()


def test_a_job_leaves_no_directory_for_temporary_files(tmp_path):
    with claimed(Location.of(str(tmp_path)), "fit") as claim:
        (claim.root / "CURRENT").write(b"")
    assert sorted(os.listdir(tmp_path)) == [".claims", "CURRENT"]
