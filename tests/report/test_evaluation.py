"""The report's section on an evaluation, from metrics with known values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.evaluation.tables import LABELS, METRICS
from padim_ray.report.evaluation import (
    CURVE_BYTES,
    MAX_CURVES,
    MAX_DEFECTS,
    MAX_GROUPS,
    summarise_evaluation,
)
from padim_ray.storage.location import Location

AUROCS = st.dictionaries(st.text(min_size=1), st.none() | st.floats(0, 1), min_size=1, max_size=9)


def metrics_of(aurocs, defects=()):
    """The content of metrics.json for groups with these image AUROCs."""
    groups = {}
    for name, auroc in aurocs.items():
        metrics = {"image_auroc": {"value": auroc, "low": auroc, "high": auroc}}
        defect = {"images": 1234, "metrics": dict(metrics)}
        groups[name] = {"images": 1234, "defective": 1000, "metrics": metrics}
        groups[name]["defects"] = dict.fromkeys(defects, defect)
    average = dict.fromkeys(METRICS, 0.5)
    return {"normal": "good", "aupro_limit": 0.3, "average": average, "groups": groups}


@given(AUROCS)
def test_groups_come_by_image_auroc_the_undefined_last(aurocs):
    evaluation = summarise_evaluation(metrics_of(aurocs), Location.of("/nowhere"))
    shown = [line.names[0] for line in evaluation.groups.lines]
    assert sorted(shown) == sorted(aurocs)
    defined = [aurocs[name] for name in shown if aurocs[name] is not None]
    assert defined == sorted(defined)
    assert all(aurocs[name] is None for name in shown[len(defined) :])


def test_a_line_holds_counts_values_and_intervals():
    content = metrics_of({"bolt": 0.5, "nut": None}, ["crack"])
    content["groups"]["bolt"]["metrics"]["image_auroc"] |= {"low": 0.25, "high": 0.75}
    content["groups"]["nut"]["metrics"]["pixel_aupro"] = {"value": 1.0}
    evaluation = summarise_evaluation(content, Location.of("/nowhere"))
    assert evaluation.groups.metrics == [LABELS["image_auroc"], LABELS["pixel_aupro"]]
    bolt, nut = evaluation.groups.lines
    assert (bolt.names, bolt.counts) == (["bolt"], ["1,234", "1,000"])
    assert bolt.metrics == [("0.500", "0.250–0.750"), ("–", "")]
    assert nut.metrics == [("–", ""), ("1.000", "")]
    assert evaluation.average.metrics == [("0.500", ""), ("0.500", "")]
    assert [line.names for line in evaluation.defects.lines] == [
        ["bolt", "crack"],
        ["nut", "crack"],
    ]
    assert evaluation.defects.metrics == [LABELS["image_auroc"]]


def test_one_group_has_no_average():
    evaluation = summarise_evaluation(metrics_of({"bolt": 0.5}), Location.of("/nowhere"))
    assert evaluation.average is None


def test_tables_and_curves_are_bounded(tmp_path):
    (tmp_path / "curves").mkdir()
    aurocs = {f"{index:03d}": index / 1000 for index in range(MAX_DEFECTS + 5)}
    for name in aurocs:
        (tmp_path / f"curves/{name}.png").write_bytes(b"png")
    content = metrics_of(aurocs, ["crack"])
    evaluation = summarise_evaluation(content, Location.of(str(tmp_path)))
    assert evaluation.groups.count == evaluation.defects.count == len(aurocs)
    lengths = [len(evaluation.groups.lines), len(evaluation.defects.lines), len(evaluation.curves)]
    assert lengths == [MAX_GROUPS, MAX_DEFECTS, MAX_CURVES]


@pytest.mark.parametrize(("size", "is_embedded"), [(CURVE_BYTES, True), (CURVE_BYTES + 1, False)])
def test_small_pictures_of_curves_are_embedded(tmp_path, size, is_embedded):
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves/bolt.png").write_bytes(np.random.default_rng(0).bytes(size))
    content = metrics_of({"bolt": 0.5, "nut": 0.6})
    (curves,) = summarise_evaluation(content, Location.of(str(tmp_path))).curves
    assert (curves.group, curves.link) == ("bolt", "curves/bolt.png")
    assert (curves.src is not None) == is_embedded
