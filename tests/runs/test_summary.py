import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.runs.summary import (
    MAX_WARNINGS,
    RUN,
    GroupVerdict,
    Summary,
    read_summary,
    timed,
    warn,
    write_summary,
)
from padim_ray.scoring.decision import Decision
from padim_ray.storage.location import Location

REFERENCE = np.sort(np.random.default_rng(0).gamma(9, 1, 500)).astype(np.float32)
DECISION = Decision(20.0, 20.0, REFERENCE)


@pytest.fixture
def root(tmp_path):
    return Location.of(str(tmp_path))


@pytest.fixture
def logged(caplog):
    """Return the lines that a summary logs, as (level, text)."""

    def report(summary):
        caplog.clear()
        with caplog.at_level(logging.INFO, "padim_ray"):
            summary.report()
        return [(record.levelname, record.message) for record in caplog.records]

    return report


def verdict(scores=(1.0, np.nan, 25.0), decision=DECISION, **more):
    values = np.array(scores, np.float32)
    return replace(GroupVerdict.of("bolt", values, decision, values), **more)


def summary(**changed):
    base = Summary(
        job="score",
        listed=100,
        failed_by_cause={"decode: empty file": 3, "fetch: not found": 1},
        groups={"bolt": 60, "nut": 40},
        before=20,
        seconds=16.0,
        stages={"score": 12.0},
        places={"report": "/out/report.html"},
    )
    return replace(base, **changed)


scores = st.lists(st.floats(2**-9, 2**20, width=32) | st.just(float("nan")), max_size=30)


@given(scores, st.none() | st.floats(0.5, 2**20, width=32), st.booleans())
def test_a_verdict_counts_scores(values, threshold, calibrated):
    reference = REFERENCE if calibrated else np.empty(0, np.float32)
    found = verdict(values, Decision(threshold, threshold, reference))
    valid = [value for value in np.array(values, np.float32).tolist() if not np.isnan(value)]
    assert (found.listed, found.scored) == (len(values), len(valid))
    assert found.failed == len(values) - len(valid)
    assert found.flagged == sum(value > threshold for value in valid if threshold is not None)
    assert found.calibration_images == len(reference)
    assert (found.histogram is None) == (found.heatmap_scale is None) == (not valid)
    if found.histogram is not None:
        assert sum(found.histogram["scores"]) == len(valid)
        assert sum(found.histogram["leave_one_out"]) == len(reference)
        assert np.all(np.diff(found.histogram["edges"]) > 0)


def test_drift_is_measured_on_the_images_chosen_for_it():
    good, defective = REFERENCE[::2], REFERENCE[:250] * 10
    everything = np.concatenate([good, defective])
    alone = GroupVerdict.of("bolt", everything, DECISION, good)
    mixed = GroupVerdict.of("bolt", everything, DECISION, everything)
    assert alone.drift["has_changed"] is False and mixed.drift["has_changed"] is True
    assert "bolt" in mixed.drift["meaning"]
    assert verdict([1.0]).drift is None  # too few images


def test_counts_follow_from_failures_and_earlier_attempts():
    found = summary(verdicts={"bolt": verdict(), "nut": verdict([30.0, 40.0])})
    assert (found.failed, found.done, found.flagged) == (4, 96, 3)
    assert found.images_per_second == 80 / 16


@pytest.mark.parametrize(
    ("job", "verb"),
    [
        ("fit", "fitted"),
        ("update", "added"),
        ("forget", "removed"),
        ("merge", "subtracted as duplicates"),
        ("score", "scored"),
        ("evaluate", "scored"),
    ],
)
def test_the_first_line_counts_images(logged, job, verb):
    first = logged(summary(job=job))[0]
    assert first == ("INFO", f"100 images listed, 96 {verb}, 4 failed; 5.0 images/s overall")


def test_a_report_mentions_what_there_is_and_nothing_else(logged):
    assert [text for _, text in logged(summary(failed_by_cause={}, before=0))][1:] == [
        "report: /out/report.html"
    ]
    lines = logged(
        summary(
            skipped=7,
            sampled=9,
            calibrated=8,
            stages={"calibrate": 3.2},
            verdicts={"bolt": verdict(loads=1), "nut": verdict(loads=2)},
        )
    )
    assert lines[1:] == [
        ("INFO", "7 more images are in the model already"),
        ("INFO", "Calibrated with 8 images in 3 s"),
        ("INFO", "20 of the images were done by an earlier attempt"),
        ("WARNING", "3 failed: decode: empty file"),
        ("WARNING", "1 failed: fetch: not found"),
        ("INFO", "2 images are anomalous"),
        ("INFO", "Densities loaded 3 times for 2 groups"),
        ("INFO", "report: /out/report.html"),
    ]


def test_a_report_warns_of_thresholds_and_drift(logged):
    drifted = GroupVerdict.of("bolt", REFERENCE * 3, DECISION, REFERENCE * 3)
    noted = verdict(threshold_note="5 training images are few")
    lines = logged(summary(verdicts={"bolt": drifted, "nut": noted}))
    warnings = [text for level, text in lines if level == "WARNING"]
    assert "'nut': 5 training images are few" in warnings
    distance = f"(drift {drifted.drift['distance']:.2f})"
    assert f"{drifted.drift['meaning']} {distance}" in warnings


@pytest.mark.parametrize("more", [0, 1, 500])
def test_warnings_are_bounded(caplog, more):
    warn([f"group {number}" for number in range(MAX_WARNINGS + more)], " (see run.json)")
    lines = [record.message for record in caplog.records]
    assert lines[:MAX_WARNINGS] == [f"group {number}" for number in range(MAX_WARNINGS)]
    assert lines[MAX_WARNINGS:] == [f"… and {more} more groups (see run.json)"] * (more > 0)


def test_a_stage_is_timed(monkeypatch, caplog):
    clock = iter([100.0, 102.345])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stages = {"before": 1.0}
    with caplog.at_level(logging.INFO, "padim_ray"), timed("draw", stages):
        pass
    monkeypatch.undo()
    assert stages == {"before": 1.0, "draw": 2.35} or stages == {"before": 1.0, "draw": 2.34}
    assert "draw: 2 s" in caplog.text


def test_run_json_gives_the_summary_back(root):
    written = summary(verdicts={"bolt": verdict(loads=2, loading_actors=1), "nut": verdict([])})
    write_summary(root, written, {"model_version": 3})
    run = json.loads((root / RUN).read())
    assert (run["model_version"], run["scored"], run["failed"], run["flagged"]) == (3, 96, 4, 1)
    read = read_summary(root, {"report": "there"})
    assert (read.listed, read.before, read.done) == (100, 100, 96)  # nothing is left to do
    assert (read.failed_by_cause, read.places) == (written.failed_by_cause, {"report": "there"})
    assert read.groups == {"bolt": 3, "nut": 0}
    assert read.flagged == written.flagged
    (root / RUN).remove()
    write_summary(root, read, {"model_version": 3})  # what is read is all there was
    assert json.loads((root / RUN).read())["groups"] == run["groups"]


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"{}", b"\xff", b'{"groups": {"a": {"x": 1}}}', b'{"groups": 1}']
)
def test_a_missing_or_damaged_run_json_is_a_sentence(root, content):
    if content is not None:
        (root / RUN).write(content)
    with pytest.raises(PadimError, match=r"run\.json is missing or damaged"):
        read_summary(root, {})
