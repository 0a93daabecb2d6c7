import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.runs import run_directory
from padim_ray.runs.job_record import JOB
from padim_ray.runs.run_directory import PART, list_parts, part_number
from padim_ray.storage.location import Location


def test_only_whole_parts_are_listed_in_their_order(place):
    """A killed task may have left a file half-written beside them."""
    for number in (11, 2, 1_000_000):
        (place / PART.format(number)).write(b"")
    for name in (".0f3a.tmp.parquet", "part-000003.parquet.bak", "notes.txt"):
        (place / "results" / name).write(b"")
    names = [part.uri.rpartition("/")[2] for part in list_parts(place)]
    assert names == ["part-000002.parquet", "part-000011.parquet", "part-1000000.parquet"]


@given(st.integers(0, 10**9))
def test_a_parts_name_holds_its_shards_number(number):
    assert part_number(Location.of("s3://bucket/out") / PART.format(number)) == number


def test_a_run_is_complete_when_it_is_marked(place):
    (place / ".staging/000001.parquet").write(b"x")
    assert not run_directory.is_complete(place)
    run_directory.complete(place)
    assert run_directory.is_complete(place)
    assert not (place / ".staging/000001.parquet").exists()
    run_directory.complete(place)  # a killed job may repeat it


@pytest.mark.parametrize("name", [PART.format(0), "run.json"])
def test_results_without_a_record_are_refused(place, name):
    run_directory.check_empty(place)
    (place / name).write(b"x")
    with pytest.raises(PadimError, match=r"results without job\.json.*--overwrite"):
        run_directory.check_empty(place)


def test_clearing_removes_the_run_and_nothing_else(place):
    mine = [JOB, "run.json", "report.html", PART.format(3), "heatmaps/a/b.png", "curves/a.png"]
    for name in (*mine, "notes.txt", ".claims/000001.json"):
        (place / name).write(b"x")
    run_directory.complete(place)
    run_directory.clear(place)
    assert not any((place / name).exists() for name in (*mine, run_directory.COMPLETE))
    assert (place / "notes.txt").exists() and (place / ".claims/000001.json").exists()
    run_directory.check_empty(place)
