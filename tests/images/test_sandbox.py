"""The sandbox of the process that decodes images, tried in the real process between two images."""

import logging
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from padim_ray.images import decode_in_child
from padim_ray.images.decode_in_child import UprightImage, decode_all
from padim_ray.images.limits import MAX_IMAGE_BYTES
from padim_ray.images.sandbox import CPU_SECONDS, memory_for
from padim_ray.storage.fail_points import VARIABLE
from tests.helpers.encoders import png

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
IMAGE = png(np.full((6, 9, 3), 7, np.uint8))
TAKEN_OVER = """
import ctypes, json, os, resource, signal, socket

def call(name, *arguments):
    if ctypes.CDLL(None, use_errno=True)[name](*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

ATTEMPTS = {
    "open": lambda: open(FILE).read(),
    "create": lambda: open(FILE + ".new", "w"),
    "connect": lambda: socket.socket().connect(("127.0.0.1", PORT)),
    "fork": os.fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(PARENT, signal.SIGUSR1),
    "trace": lambda: call("ptrace", 16, PARENT, 0, 0),
    "raise limits": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)),
    "become root": lambda: os.setuid(0) or os.getuid() or 1 / 0,
}

def take_over(text, loads=json.loads):
    for name in TRIED:
        try:
            print(name, "succeeded", ATTEMPTS[name]())
        except (OSError, ValueError) as error:
            print(name, "failed", error)
    print("end", flush=True)
    return loads(text)

json.loads = take_over
"""
WITHOUT_LIBSECCOMP = """
class Hiding(ctypes.CDLL):
    def __init__(self, name, *others, **more):
        if name == "libseccomp.so.2":
            raise OSError("not installed")
        super().__init__(name, *others, **more)
ctypes.CDLL = Hiding
"""


@pytest.fixture
def child(monkeypatch):
    """A function that decodes an image in a new child and returns the child's process ID."""
    monkeypatch.setattr(decode_in_child, "_idle", children := [])

    def decode():
        (answer,) = decode_all([IMAGE], UprightImage(1_000_000))
        assert answer.pixels.max() == 7
        return children[-1].process.pid

    yield decode
    for each in children:
        each.close()


def attempts(capfd):
    """Read the outcome of each attempt of `TAKEN_OVER` from its output."""
    lines = capfd.readouterr().err.partition("end\n")[0].splitlines()
    return {line.split(" failed ")[0]: line.partition(" failed ")[2] for line in lines}


def take_over(monkeypatch, tmp_path, server, tried, more=""):
    """Have the next child run `TAKEN_OVER` when it has its first image."""
    (tmp_path / "secret").write_text("secret")
    values = f"FILE, PORT = {str(tmp_path / 'secret')!r}, {server.getsockname()[1]}\n"
    values += f"PARENT, TRIED = {os.getpid()}, {tried}\n"
    (tmp_path / "sitecustomize.py").write_text(values + TAKEN_OVER + more)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def test_a_child_that_an_image_takes_over_can_only_answer(
    child, monkeypatch, tmp_path, capfd, server
):
    tried = ["open", "create", "connect", "fork", "exec", "kill", "trace", "raise limits"]
    take_over(monkeypatch, tmp_path, server, [*tried, "become root"])
    child()
    done = attempts(capfd)
    assert list(done) == [*tried, "become root"]
    refused = "not permitted", "not allowed"
    assert [name for name in tried if not any(word in done[name] for word in refused)] == []
    assert not (tmp_path / "secret.new").exists()
    with pytest.raises(TimeoutError):
        server.accept()


def test_without_libseccomp_files_and_sockets_stay_out_of_reach(
    child, monkeypatch, tmp_path, capfd, server, caplog
):
    tried = ["open", "create", "connect"]
    take_over(monkeypatch, tmp_path, server, tried, WITHOUT_LIBSECCOMP)
    decode_in_child._tell_once.cache_clear()
    with caplog.at_level(logging.INFO, "padim_ray"):
        child()
        child()
    done = attempts(capfd)
    assert list(done) == tried
    assert all("Too many open files" in outcome for outcome in done.values()), done
    assert caplog.text.count("Images are decoded without a filter of system calls") == 1
    with pytest.raises(TimeoutError):
        server.accept()


def test_a_child_has_no_credentials(child, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "HOME", "ANYTHING"):
        monkeypatch.setenv(name, "5ecret")
    monkeypatch.setenv(VARIABLE, "other")
    environment = Path(f"/proc/{child()}/environ").read_bytes()
    assert b"5ecret" not in environment
    assert f"{VARIABLE}=other".encode() in environment.split(b"\0")


def test_a_child_has_limits_and_no_privileges(child):
    pid = child()
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    for name in ("processes", "open files", "core file size"):
        assert limits[f"Max {name}"] == ["0", "0"]
    assert limits["Max cpu time"] == [str(CPU_SECONDS)] * 2
    memory = str(memory_for(1_000_000, MAX_IMAGE_BYTES))
    assert limits["Max address space"] == limits["Max file size"] == [memory] * 2
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == 0
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split() + status["Gid"].split() + status["Groups"].split()
