"""Room on disk for objects that Ray spills, as `df` counts it, and the warnings of `plan`."""

import subprocess

import pytest

from padim_ray import cli
from padim_ray.planning.spilling import spill_directory, spill_room, warn_of_spilling


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({}, "/tmp/ray"),
        ({"TMPDIR": "/a"}, "/a/ray"),
        ({"TMPDIR": "/a", "RAY_TMPDIR": "/b"}, "/b/ray"),
        ({"RAY_TMPDIR": "/b", "RAY_object_spilling_directory": "/c/d"}, "/c/d"),
    ],
)
def test_objects_are_spilled_where_ray_would_spill_them(monkeypatch, variables, directory):
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_object_spilling_directory"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert spill_directory() == directory


@pytest.mark.parametrize("fullest", [None, "0.9", "1", "0"])
def test_ray_leaves_a_share_of_the_disk_free(monkeypatch, tmp_path, fullest):
    if fullest is not None:
        monkeypatch.setenv("RAY_local_fs_capacity_threshold", fullest)
    command = ["df", "--block-size=1", "--output=size,avail", tmp_path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    size, available = map(int, lines[-1].split())
    expected = max(0, available - (1 - float(fullest or "0.95")) * size)
    room = spill_room(str(tmp_path / "not/there/yet"))
    assert room == pytest.approx(expected, abs=0.01 * size)  # others write to this disk


def test_a_job_that_fits_into_the_object_store_or_on_disk_is_not_warned_of(disk, monkeypatch):
    directory, give_space = disk
    monkeypatch.setenv("RAY_object_spilling_directory", str(directory))
    assert give_space("100m")  # 104,857,600 bytes, of which Ray uses 95 %
    assert warn_of_spilling(5 * 10**6, store=5 * 10**6) is None
    assert warn_of_spilling(104 * 10**6, store=5 * 10**6) is None
    assert warn_of_spilling(105 * 10**6, store=5 * 10**6) == (
        f"has up to 105 MB of objects at once, but Ray's object store holds 5 MB, and the disk of "
        f"{directory} has room for 99.6 MB more. Make room, or set RAY_object_spilling_directory "
        "to a directory on a larger disk"
    )


def test_plan_warns_of_a_spill_disk_that_is_too_small_for_a_job_on_this_machine(
    archive, capsys, disk, monkeypatch
):
    monkeypatch.setenv("RAY_object_spilling_directory", str(disk[0]))

    def planned(*arguments):
        images = f"{archive}/{{group}}/train/good/*"
        with pytest.raises(SystemExit) as exit_:
            cli.main(["plan", "--images", images, "--rate", "100", "--sample", "0", *arguments])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    huge = ("--image-size", "4096")  # statistics that no object store holds
    assert "! fit has up to" in planned(*huge) and str(disk[0]) in planned(*huge)
    assert "! fit has up to" not in planned(*huge, "--cpus", "64")  # a cluster elsewhere
    assert "! fit has up to" not in planned("--image-size", "64")
