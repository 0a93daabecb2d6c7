import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from padim_ray.errors import PadimError
from padim_ray.storage import claim
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location

HOLD = """
import sys, time
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location
with claimed(Location.of(sys.argv[1]), "score"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.1)
    monkeypatch.setattr(claim, "LAPSE", 1.0)


def claims(place):
    return [file.uri.rpartition("/")[2] for file in (place / ".claims").list_files()]


def write_claim(place, number=1, **changes):
    """Write a claim as another job would have left it."""
    content = {**claim._this_process(), "id": "x", "job": "fit", "since": "now"} | changes
    (place / f".claims/{number:06d}.json").write(json.dumps(content).encode())


def test_one_job_holds_a_directory(place):
    with claimed(place, "score") as mine:
        mine.check()
        refusal = r"is being written by another score job: process \d+"
        with pytest.raises(PadimError, match=refusal), claimed(place, "fit"):
            pass
        mine.check()
    assert claims(place) == []
    with claimed(place, "fit") as mine:
        mine.check()


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


def test_a_killed_jobs_claim_on_this_machine_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LAPSE", 60.0)
    place = Location.of(str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
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
    write_claim(place, boot="another machine", host="node7", beat=0)
    done = threading.Event()

    def beat_on():
        beat = 0
        while not done.wait(0.2):
            beat += 1
            write_claim(place, boot="another machine", host="node7", beat=beat)

    thread = threading.Thread(target=beat_on)
    thread.start()
    try:
        with pytest.raises(PadimError, match="on node7"), claimed(place, "score"):
            pass
    finally:
        done.set()
        thread.join()


def test_a_job_whose_claim_was_taken_over_notices(place):
    with claimed(place, "score") as mine:
        write_claim(place, number=mine.number + 1)
        with pytest.raises(PadimError, match=r"Another job took over .*, so this one stops"):
            mine.check()
    assert claims(place) == ["000002.json"]  # the other job's claim stays


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_claim_lapses(place, content):
    (place / ".claims/000001.json").write(content)
    with claimed(place, "score") as mine:
        mine.check()


def test_a_claim_leaves_no_empty_directories(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with claimed(Location.of(str(tmp_path / name)), "score"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
