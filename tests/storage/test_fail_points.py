import signal
import subprocess
import sys

import pytest

from padim_ray.storage.fail_points import VARIABLE, is_on

KILL = "from padim_ray.storage.fail_points import kill_at; kill_at('publish'); print('alive')"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("publish", True), ("decoder,publish", True), ("publishing", False), ("", False)],
)
def test_the_environment_switches_fail_points_on(value, expected, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    assert is_on("publish") == expected


def test_without_the_variable_no_fail_point_is_on(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not is_on("publish")


@pytest.mark.parametrize(
    ("value", "exit_code", "output"), [("publish", -signal.SIGKILL, ""), ("other", 0, "alive\n")]
)
def test_a_process_is_killed_at_a_fail_point_that_is_on(value, exit_code, output, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    run = subprocess.run([sys.executable, "-c", KILL], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (exit_code, output)
