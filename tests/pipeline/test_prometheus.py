"""Metrics: labels and calls stay bounded, and counts are right."""

import ast
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import padim_ray
from padim_ray.images.limits import FORMATS
from padim_ray.pipeline.cluster import prometheus
from padim_ray.pipeline.cluster.prometheus import MAX_GROUPS, OTHERS, JobMetrics, label, stage
from padim_ray.runs.failures import KNOWN_CAUSES, bounded_cause
from tests.faults.processes import wait_until


class Recorder:
    """Replaces Ray's metrics: records values by name and labels, and the number of calls."""

    def __init__(self):
        self.values, self.calls = defaultdict(Counter), 0

    def __call__(self, name):
        def record(value, labels):
            kind, names, _ = prometheus._NAMES[name]
            assert labels.keys() == set(names.split())
            assert all(text.isascii() for text in labels.values())
            self.calls += 1
            key = tuple(labels[each] for each in names.split())
            self.values[name][key] = value if kind == "Gauge" else self.values[name][key] + value

        return SimpleNamespace(inc=record, set=record, observe=record)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(prometheus, "_metric", recorder)
    return recorder


def test_a_shard_costs_the_same_however_many_images_it_has(recorder):
    metrics = JobMetrics("score", "m", 1, {"a": 10**6}, 10)
    calls = []
    for images in (10, 100_000):
        before = recorder.calls
        metrics.count_scored("a", np.geomspace(1.5, 2000, images).astype(np.float32), 3)
        calls.append(recorder.calls - before)
    assert calls[0] == calls[1] <= len(prometheus.SCORE_EDGES) + 4


@pytest.mark.parametrize("count", [3, MAX_GROUPS, MAX_GROUPS + 1, 5000])
def test_thousands_of_groups_share_a_hundred_labels(recorder, count):
    groups = {f"line {number:04d}": 1 + number for number in range(count)}
    metrics = JobMetrics("score", "m", 1, groups, 10)
    for number, group in enumerate(groups):
        metrics.count_scored(group, np.array([5.0, np.nan, 7.0]), flagged=number % 2)
    scored = recorder.values["padim_images_scored_total"]
    assert len(scored) == min(count, MAX_GROUPS)
    assert sum(scored.values()) == 2 * count
    assert sum(recorder.values["padim_images_flagged_total"].values()) == count // 2
    if count > MAX_GROUPS:
        others = scored["score", OTHERS]
        assert others == 2 * (count - MAX_GROUPS + 1)
        assert ("score", f"line {count - 1:04d}") in scored  # the largest has its own
        ratio = recorder.values["padim_flagged_ratio"]["score", OTHERS]
        assert ratio == recorder.values["padim_images_flagged_total"]["score", OTHERS] / others
    assert max(map(len, recorder.values.values())) <= MAX_GROUPS * (len(prometheus.SCORE_EDGES) + 1)


@given(st.lists(st.floats(0, 5000, width=32), min_size=1), st.integers(0, 5))
def test_buckets_count_scores_up_to_their_ends(scores, failed):
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(prometheus, "_metric", recorder)
        metrics = JobMetrics("score", "m", 1, {"a": 9}, 10)
        metrics.count_scored("a", np.float32(scores + [np.nan] * failed), 0)
    told = recorder.values["padim_score_bucket_total"]
    for edge in prometheus.SCORE_EDGES:
        assert told["score", "a", f"{edge:.6g}"] == sum(score <= edge for score in scores)
    assert told["score", "a", "+Inf"] == len(scores)


def test_every_cause_in_the_code_has_its_label():
    """A new cause must not be counted as "other" by accident."""
    found = defaultdict(set)
    package = Path(padim_ray.__file__).parent
    for path in set(package.rglob("*.py")) - set(package.glob("report/*.py")):  # counts no images
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ImageError":
                match node.args[:2]:
                    case [ast.Constant(value=where), ast.Constant(value=cause)]:
                        found[where].add(cause)
                    case [ast.Name(id="stage"), ast.Constant(value=cause)]:
                        found["decode"].add(cause)
    found["decode"].add(f"not a {', '.join(FORMATS)} image")
    assert dict(found) == KNOWN_CAUSES


@given(st.text())
def test_every_error_text_maps_to_a_known_label(text):
    assert bounded_cause(text)[0] in {*KNOWN_CAUSES, "other"}
    for where, causes in KNOWN_CAUSES.items():
        assert bounded_cause(f"{where}: {text}")[1] in {*causes, "other"}
        for cause in causes:
            assert bounded_cause(f"{where}: {cause}") == (where, cause)


@given(st.text())
def test_labels_are_short_and_ascii(text):
    assert label(text).isascii() and len(label(text)) <= prometheus.MAX_LABEL_LENGTH


def test_failing_work_is_not_counted(recorder):
    with pytest.raises(ZeroDivisionError), stage("score", 5):
        raise ZeroDivisionError
    assert recorder.calls == 0
    with stage("score", 5):
        pass
    assert recorder.values["padim_stage_images_total"] == {("score",): 5}


def test_gauges_are_set_again_while_the_job_runs(recorder, monkeypatch):
    monkeypatch.setattr(prometheus, "REFRESH_SECONDS", 0.001)
    metrics = JobMetrics("fit", "s3://m", 7, {"a": 5, "b": 6}, 1234)
    with metrics:
        metrics.report_progress(4, 1)
        told, recorder.values = recorder.values, defaultdict(Counter)
        # set again by the thread
        wait_until(lambda: len(recorder.values) == len(told), 30)
    assert {name: dict(values) for name, values in recorder.values.items()} == {
        name: dict(values) for name, values in told.items()
    }
    assert told["padim_model_info"] == {("fit", "s3://m", "7"): 1}
    assert told["padim_run_listed_images"] == {("fit",): 11}
    assert told["padim_run_done_images"] == {("fit",): 4}
