from typing import Any

from padim_ray.report.verdict import judge, rank_groups
from tests.report.run_directory import drift, group_summary


def run(groups: dict[str, dict], **others: Any) -> dict[str, Any]:
    names = ("listed", "scored", "failed", "flagged")
    totals = {name: sum(group[name] for group in groups.values()) for name in names}
    defaults = {"alpha": 0.01, "threshold": None, "failed_by_cause": {}}
    return {**totals, **defaults, "groups": groups, **others}


def test_a_run_without_findings_is_fine():
    verdict = judge(run({"a": group_summary(1200), "b": group_summary(34)}))
    assert verdict.tone == "fine"
    assert verdict.headline == "1,234 images scored, none flagged or failed"
    assert verdict.findings == []


def test_drift_and_failures_are_warnings_and_flags_a_notice():
    groups = {
        "a": group_summary(90, listed=100, failed=10, flagged=3),
        "b": group_summary(100, drift=drift(changed=True)),
    }
    verdict = judge(run(groups, failed_by_cause={"decode: empty file": 10}))
    assert verdict.tone == "warning"
    assert verdict.headline == "Drift in 1 group, 10 images failed, 3 flagged"
    drifted, failed, flagged = verdict.findings
    assert (drifted.tone, failed.tone, flagged.tone) == ("warning", "warning", "notice")
    assert drifted.sentence.endswith("have changed since the model was fitted: b.")
    assert "10 images of 200 failed (5 %): decode: empty file (10)." in failed.sentence
    assert "3 of 190 scored images are flagged (1.6 %;" in flagged.sentence
    assert "about 1 %" in flagged.sentence


def test_flags_alone_are_a_notice():
    assert judge(run({"a": group_summary(flagged=1)})).tone == "notice"


def test_a_threshold_set_by_hand_has_no_expected_share():
    verdict = judge(run({"a": group_summary(flagged=1)}, threshold=12.0))
    assert "set by hand" in verdict.findings[0].sentence


def test_groups_without_a_threshold_or_with_a_note_are_named():
    groups = {
        "a": group_summary(threshold=None, threshold_note="the model has no scores of it"),
        "b": group_summary(threshold_note="40 images can't reach it"),
    }
    sentences = [finding.sentence for finding in judge(run(groups)).findings]
    assert sentences[0].startswith("1 group without a threshold") and "a." in sentences[0]
    assert sentences[1] == "1 threshold with a caveat: b."


def test_drifted_groups_come_first_then_those_with_the_most_flags():
    groups = {
        "calm": group_summary(),
        "flags": group_summary(flagged=9),
        "drift": group_summary(drift=drift(changed=True)),
        "more": group_summary(flagged=50),
        "no scores": group_summary(0, flagged=0),
    }
    ranked = [name for name, _ in rank_groups(run(groups))]
    assert ranked == ["drift", "more", "flags", "calm", "no scores"]
