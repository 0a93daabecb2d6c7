import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.report.text import count, duration, figure, join_some, moment, percent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(1, 10**6), "<0.01 %"),
        (percent(999_999, 10**6), ">99.9 %"),
        (percent(0, 0), "0 %"),
        (percent(1, 1), "100 %"),
        (percent(0.01), "1 %"),
        (percent(1, 8), "12 %"),
        (figure(None), "–"),
        (figure(float("nan")), "–"),
        (figure(float("inf")), "inf"),
        (figure(12.3456), "12.35"),
        (figure(123456.7), "123,457"),
        (figure(0.0000123), "1.2e-05"),
        (figure(0), "0"),
        (duration(5.25), "5.25 s"),
        (duration(185), "3 min 5 s"),
        (duration(7800), "2 h 10 min"),
        (count(1, "image"), "1 image"),
        (count(0, "image"), "0 images"),
        (count(12_000, "image"), "12,000 images"),
        (moment("2026-11-20T05:12:03+00:00"), "2026-11-20 05:12 UTC"),
        (moment("2026-11-20T05:12:03"), "2026-11-20 05:12"),
        (join_some(["a", "b", "c"], 2), "a, b, 1 more"),
        (join_some(["a", "b"], 2, "causes"), "a, b"),
    ],
)
def test_numbers_read_well(text: str, expected: str):
    assert text == expected


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_only_nothing_is_zero_percent(part, whole):
    assert (percent(part, whole) == "0 %") == (part == 0)


@given(st.floats(-(10.0**15), 10.0**15).filter(lambda value: value == 0 or abs(value) > 1e-9))
def test_figures_have_two_correct_digits_at_least(value):
    assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=0.05)


@given(st.integers(60, 10**7))
def test_durations_are_exact_to_their_smallest_unit(seconds):
    units = {"s": 1, "min": 60, "h": 3600}
    parts = duration(seconds).replace(",", "").split()
    total = sum(
        int(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert 0 <= seconds - total < units[parts[-1]]
