import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import TooManyFailed
from padim_ray.runs.failures import MAX_UNFETCHABLE, Failures, bounded_cause, count_causes
from padim_ray.runs.options.common import JobOptions

counts = st.integers(0, 20)


def failures(max_failed=None, listed=10**6):
    return Failures(JobOptions(images="x", model="m", max_failed=max_failed), listed)


def test_causes_are_counted_without_their_details():
    errors = ["decode: broken image (line 1)", None, "decode: broken image (line 2)", "fetch: gone"]
    assert count_causes(errors) == {"decode: broken image": 2, "fetch: gone": 1}


@pytest.mark.parametrize(("max_failed", "most"), [(0, 0), (5, 5), (0.01, 10)])
def test_one_failure_too_many_ends_a_job(max_failed, most):
    counted = failures(max_failed, listed=1000)
    for _ in range(most):
        counted.add(1, {"decode: empty file": 1})
    counted.add(10, {})
    message = (
        rf"{most + 1} of the {most + 11} images read so far failed .*--max-failed {max_failed}"
    )
    with pytest.raises(TooManyFailed, match=message):
        counted.add(1, {"decode: empty file": 1})


DENIED, GONE, BROKEN = "fetch: permission denied", "fetch: not found", "decode: broken image"


def test_a_store_that_gives_nothing_ends_a_job():
    counted = failures()
    counted.add(MAX_UNFETCHABLE - 1, {DENIED: MAX_UNFETCHABLE - 1})
    with pytest.raises(TooManyFailed, match="not one could be fetched"):
        counted.add(1, {GONE: 1})


def test_a_store_that_goes_away_ends_a_job():
    counted = failures()
    counted.add(10, {})
    for _ in range(9):
        counted.add(MAX_UNFETCHABLE - 1, {DENIED: MAX_UNFETCHABLE - 1})
        counted.add(1, {})
    counted.add(MAX_UNFETCHABLE - 1, {DENIED: MAX_UNFETCHABLE - 1})
    with pytest.raises(TooManyFailed, match="not one of the last 1000 could be fetched"):
        counted.add(1, {DENIED: 1})


@pytest.mark.parametrize("cause", [BROKEN, GONE])
def test_a_bad_group_does_not(cause):
    counted = failures()
    counted.add(1, {} if cause.startswith("fetch") else {cause: 1})
    counted.add(2 * MAX_UNFETCHABLE, {cause: 2 * MAX_UNFETCHABLE})
    assert counted.count >= 2 * MAX_UNFETCHABLE


def test_too_many_unreadable_images_end_a_job_by_default():
    counted = failures(listed=2000)
    counted.add(1500, {BROKEN: 15, GONE: 5, DENIED: 30})
    with pytest.raises(TooManyFailed, match="more than 1% of the listed ones and more than 10"):
        counted.add(1, {BROKEN: 1})


def test_a_job_is_complete_without_unfetched_images_or_if_they_are_allowed():
    for more in ({}, {BROKEN: 3, GONE: 2}):
        counted = failures(listed=100)
        counted.add(100, more)
        counted.check_fetched()
        assert counted.is_complete
        counted.add(0, {DENIED: 2, "fetch: SSLError": 1})
        message = r"3 of 100 images \(fetch: permission denied: 2, fetch: SSLError: 1\) could not"
        with pytest.raises(TooManyFailed, match=message):
            counted.check_fetched()
    allowed = failures(max_failed=3, listed=100)
    allowed.add(100, {DENIED: 3})
    allowed.check_fetched()


causes = st.dictionaries(st.sampled_from(["decode: empty file", "fetch: not found", "x"]), counts)


@given(st.lists(st.tuples(counts, causes)))
def test_batches_add_up(batches):
    counted = failures()
    for read, failed in batches:
        counted.add(read + sum(failed.values()) + 1, failed)
    assert counted.count == sum(sum(failed.values()) for _, failed in batches)
    assert counted.read == counted.count + len(batches) + sum(read for read, _ in batches)
    for cause, count in counted.causes.items():
        assert count == sum(failed.get(cause, 0) for _, failed in batches)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("decode: empty file", ("decode", "empty file")),
        ("decode: whatever a library says", ("decode", "other")),
        ("fetch: empty file", ("fetch", "other")),
        ("elsewhere: empty file", ("other", "other")),
        ("", ("other", "other")),
    ],
)
def test_unknown_causes_are_other(cause, expected):
    assert bounded_cause(cause) == expected
