"""The verdict on a run: the findings that an engineer should read first."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from padim_ray.report.text import count, join_some, percent

Tone = Literal["warning", "notice", "fine"]


@dataclass(frozen=True)
class Finding:
    """A finding. `brief` goes into the headline; `anchor` is the section with the details."""

    tone: Tone
    brief: str
    sentence: str
    anchor: str


@dataclass(frozen=True)
class Verdict:
    """All findings, the gravest first, under a headline."""

    tone: Tone
    headline: str
    findings: list[Finding]


def judge(run: Mapping[str, Any]) -> Verdict:
    """The verdict on a run.

    Args:
        run: the content of `run.json`.
    """
    findings = [
        finding
        for check in (_listing, _drift, _failures, _flags, _thresholds)
        for finding in check(run)
    ]
    tone: Tone = min(
        (finding.tone for finding in findings),
        key=["warning", "notice", "fine"].index,
        default="fine",
    )
    briefs = [finding.brief for finding in findings if finding.brief]
    headline = (
        ", ".join(briefs) or f"{count(run['scored'], 'image')} scored, none flagged or failed"
    )
    return Verdict(tone, headline[0].upper() + headline[1:], findings)


def has_drifted(group: Mapping[str, Any]) -> bool:
    """Whether a group's images have changed since the model was fitted."""
    return bool(group["drift"] and group["drift"]["has_changed"])


def flagged_share(group: Mapping[str, Any]) -> float:
    """The share of a group's scored images that are anomalous."""
    return group["flagged"] / max(group["scored"], 1)


def rank_groups(run: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and groups: first those that drifted, then by share of flagged images."""

    def noteworthiness(item: tuple[str, Mapping[str, Any]]) -> tuple[Any, ...]:
        name, group = item
        distance = group["drift"]["distance"] if has_drifted(group) else 0
        return -distance, -flagged_share(group), -group["failed"], name

    return sorted(run["groups"].items(), key=noteworthiness)


def _listing(run: Mapping[str, Any]) -> Iterable[Finding]:
    if not run["listed"]:
        yield Finding("notice", "no images", "There were no images to score.", "images")
    if not run.get("is_complete", True):  # earlier padim-ray wrote this only of complete runs
        sentence = (
            "Some images could not be fetched, so this run is not complete. Repeat its command to "
            "try them again."
        )
        yield Finding("warning", "not complete", sentence, "failed")


def _drift(run: Mapping[str, Any]) -> Iterable[Finding]:
    names = [name for name, group in rank_groups(run) if has_drifted(group)]
    if not names:
        return
    if len(run["groups"]) == 1:
        yield Finding(
            "warning", "drift", f"{run['groups'][names[0]]['drift']['meaning']}.", "groups"
        )
    else:
        for higher, meaning in (
            (True, "have changed since the model was fitted"),
            (
                False,
                "score lower than unseen good images do: the model was fitted to them, or they "
                "hardly vary",
            ),
        ):
            drifted = [name for name in names if run["groups"][name]["drift"]["higher"] is higher]
            if drifted:
                sentence = (
                    f"In {len(drifted):,} of {len(run['groups']):,} groups the images {meaning}: "
                    f"{join_some(drifted, 5)}."
                )
                brief = f"drift in {count(len(drifted), 'group')}"
                yield Finding("warning", brief, sentence, "groups")


def _failures(run: Mapping[str, Any]) -> Iterable[Finding]:
    if run["failed"]:
        failed = count(run["failed"], "image")
        causes = [f"{cause} ({number:,})" for cause, number in run["failed_by_cause"].items()]
        sentence = (
            f"{failed} of {run['listed']:,} failed ({percent(run['failed'], run['listed'])}): "
            f"{join_some(causes, 3, 'causes')}."
        )
        yield Finding("warning", f"{failed} failed", sentence, "failed")


def _flags(run: Mapping[str, Any]) -> Iterable[Finding]:
    if run["flagged"]:
        share = percent(run["flagged"], run["scored"])
        expected = (
            "the threshold was set by hand"
            if run["threshold"] is not None
            else f"about {percent(_expected_share(run))} is expected of good images alone"
        )
        sentence = (
            f"{run['flagged']:,} of {run['scored']:,} scored images are flagged "
            f"({share}; {expected})."
        )
        yield Finding("notice", f"{run['flagged']:,} flagged", sentence, "images")


def _expected_share(run: Mapping[str, Any]) -> float:
    """The expected share of good images that are flagged: α, or 1/(n+1) if n is too small for α."""
    judged = [group for group in run["groups"].values() if group["threshold"] is not None]
    expected = [
        group["scored"] * max(run["alpha"], 1 / (group["calibration_images"] + 1))
        for group in judged
    ]
    return sum(expected) / max(sum(group["scored"] for group in judged), 1)


def _thresholds(run: Mapping[str, Any]) -> Iterable[Finding]:
    without = _names(run, lambda group: group["threshold"] is None)
    if without:
        sentence = (
            f"{count(len(without), 'group')} without a threshold, where nothing can be flagged: "
            f"{join_some(without, 5)}."
        )
        yield Finding("notice", "", sentence, "groups")
    noted = _names(run, lambda group: group["threshold"] is not None and group["threshold_note"])
    if noted:
        sentence = f"{count(len(noted), 'threshold')} with a caveat: {join_some(noted, 5)}."
        yield Finding("notice", "", sentence, "groups")


def _names(run: Mapping[str, Any], is_wanted: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    return [name for name, group in rank_groups(run) if is_wanted(group)]
