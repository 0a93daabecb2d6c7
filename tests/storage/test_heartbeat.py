import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from padim_ray.storage.claim import claimed
from padim_ray.storage.heartbeat import Heartbeat, describe_process, encode, find_living
from padim_ray.storage.location import Location

CLAIM_AS_NOBODY = """
import os, sys
from padim_ray.errors import PadimError
from padim_ray.storage.claim import claimed
from padim_ray.storage.location import Location
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
assert not os.path.exists(f"/proc/{sys.argv[2]}")
try:
    with claimed(Location.of(sys.argv[1]), "score"):
        print("taken over")
except PadimError as error:
    print(error)
"""
HIDE = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "2")


@pytest.fixture
def elsewhere():
    """Describes this process as one of another machine, which can't be looked up here."""
    return describe_process("score") | {"boot": "another machine"}


def test_a_process_is_found_by_its_heartbeat_and_forgotten_without_one(place, elsewhere):
    (place / "a").write(encode(elsewhere | {"job": "fit"}))
    (place / "b").write(encode(elsewhere))
    heartbeat = Heartbeat(place / "b", elsewhere)
    heartbeat.start()
    signs = {name: [place / name] for name in ("a", "b", "ended")}
    found = find_living(signs, place.uri)
    heartbeat.stop()
    assert {name: process["job"] for name, process in found.items()} == {"b": "score"}
    assert find_living(signs, place.uri) == {}


def test_a_heartbeat_goes_on_after_the_storage_failed(tmp_path, elsewhere):
    place = Location.of(str(tmp_path / "directory"))
    heartbeat = Heartbeat(place / "beat", elsewhere)
    (tmp_path / "directory").write_bytes(b"a file is in the way")
    heartbeat.start()
    time.sleep(1)
    (tmp_path / "directory").unlink()
    deadline = time.monotonic() + 10
    while not (place / "beat").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    heartbeat.stop()


def test_a_process_that_has_ended_is_gone_at_once_even_as_a_zombie(tmp_path, monkeypatch):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "600")
    place = Location.of(str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (place / "sign").write(encode(describe_process("fit") | {"pid": process.pid, "birth": birth}))
    assert set(find_living({0: [place / "sign"]}, "")) == {0}
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert find_living({0: [place / "sign"]}, "") == {}
    process.communicate()
    assert find_living({0: [place / "sign"]}, "") == {}


@pytest.fixture
def claim_as_nobody():
    """A function that claims a directory as another user, who doesn't see others' processes."""
    hide = ["unshare", "--mount", "sh", "-c", HIDE, "sh"]
    if os.getuid() != 0 or subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and a kernel that lets it mount /proc with hidepid")
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o777)

    def claim(pid):
        command = [*hide, sys.executable, "-c", CLAIM_AS_NOBODY, directory, str(pid)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    previous = os.umask(0)
    yield Location.of(directory), claim
    os.umask(previous)
    shutil.rmtree(directory)


def test_a_live_job_of_a_user_whose_processes_are_hidden_keeps_its_claim(claim_as_nobody):
    place, claim = claim_as_nobody
    with claimed(place, "fit") as mine:
        assert "is being written by another fit job" in claim(os.getpid())
        mine.check()
    assert claim(os.getpid()) == "taken over\n"


def test_a_dead_job_of_a_user_whose_processes_are_hidden_is_gone_at_once(
    claim_as_nobody, monkeypatch
):
    monkeypatch.setenv("PADIM_RAY_LAPSE_SECONDS", "600")
    place, claim = claim_as_nobody
    with subprocess.Popen(["true"]) as process:
        process.wait()
    sign = encode(describe_process("fit") | {"pid": process.pid, "lapse": 600})
    (place / ".claims/000001.json").write(sign)
    assert claim(process.pid) == "taken over\n"
