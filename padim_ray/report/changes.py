"""The page of a comparison: how far two models agree, and the images that changed most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from padim_ray.errors import ImageError
from padim_ray.evaluation.agreement import Comparison, GroupComparison, Verdicts
from padim_ray.report.charts import draw_score_pairs
from padim_ray.report.gallery import Picture, encode_pictures, most_pixels, read_picture
from padim_ray.report.page import MAX_BYTES, MOST_CHARTS, MOST_GROUPS, make_filters, render
from padim_ray.report.rows import Row
from padim_ray.report.text import count, join_some, percent
from padim_ray.report.verdict import Tone
from padim_ray.storage.location import Location

MOST_POINTS = 500  # in a chart
ENOUGH_CORRELATION = 0.9  # below, a group's order has changed enough to be told
_OWN = (
    *("uri", "group", "size", "version_tag", "change", "width", "height"),
    *("heatmap_before", "heatmap_after"),
)
_OF_SIDES = ("score", "threshold", "is_anomalous", "p_value")


@dataclass(frozen=True)
class ChangedImage:
    """An image with its pictures; pairs are of the model before and of the one after.

    `change`: the factor between its scores, in units of their thresholds. `ratios`: scores over
    thresholds. `heat_problems`: why a heatmap is missing.
    """

    uri: str
    group: str
    captured: Mapping[str, str]
    change: float
    scores: tuple[float, float]
    ratios: tuple[float | None, float | None]
    flags: tuple[bool, bool]
    width: int
    height: int
    thumbnail: Picture | None
    problem: str | None
    heats: tuple[Picture | None, ...]
    heat_problems: tuple[str | None, ...]
    regions: tuple[()] = ()  # two models would find different ones

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2] or self.uri

    @property
    def is_new(self) -> bool:
        """Whether only the second model flags it."""
        return self.flags[1] and not self.flags[0]

    @property
    def is_gone(self) -> bool:
        """Whether only the first one does."""
        return self.flags[0] and not self.flags[1]


def write_changes(
    page: Location,
    comparison: Comparison,
    groups: Mapping[str, tuple[Verdicts, Verdicts]],
    rows: Sequence[Row],
    *,
    storage_options: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write the page of a comparison.

    Args:
        groups: both models' verdicts, by group.
        rows: the most changed images, the first one most: rows of compare.parquet, with
            `heatmap_before` and `heatmap_after`, URIs, where they were drawn.
        storage_options: for the images' storage.
        sources: what to fetch for an image's URI, where that is something else.
    """
    sources = sources or {}
    pictures = encode_pictures(
        [
            ([sources.get(row["uri"], row["uri"]) for row in rows], storage_options or {}),
            *(
                ([row.get(f"heatmap_{side}") for row in rows], page.options)
                for side in ("before", "after")
            ),
        ],
        most_pixels(rows),
    )
    gallery = [_image(row, *three) for row, three in zip(rows, pictures, strict=True)]
    html = _render(comparison, groups, gallery)
    while len(html) > MAX_BYTES and gallery:  # texts of any length may have come with a manifest
        gallery = gallery[: len(gallery) // 2]
        html = _render(comparison, groups, gallery)
    page.write(html)


def _render(
    comparison: Comparison,
    groups: Mapping[str, tuple[Verdicts, Verdicts]],
    gallery: Sequence[ChangedImage],
) -> bytes:
    ranked = sorted(comparison.groups.items(), key=_noteworthiness)
    findings = _findings(comparison)
    kinds = {True: "newly flagged", False: "same decision"}
    verdicts = ["no longer flagged" if each.is_gone else kinds[each.is_new] for each in gallery]
    tones: list[Tone] = ["warning", "notice", "fine"]
    return render(
        "changes.html",
        comparison=comparison,
        headline=_headline(comparison),
        tone=min((tone for tone, _ in findings), key=tones.index),
        findings=findings,
        charts=[(name, group, _chart(groups[name])) for name, group in ranked[:MOST_CHARTS]],
        other_groups=ranked[MOST_CHARTS : MOST_CHARTS + MOST_GROUPS],
        more_groups=max(0, len(ranked) - MOST_CHARTS - MOST_GROUPS),
        gallery=gallery,
        filters=make_filters(gallery, "decision", verdicts),
    )


def _noteworthiness(item: tuple[str, GroupComparison]) -> tuple[Any, ...]:
    name, group = item
    flipped = group.newly_flagged + group.no_longer_flagged
    correlation = 1.0 if group.rank_correlation is None else group.rank_correlation
    return -flipped / max(group.compared, 1), correlation, name


def _headline(comparison: Comparison) -> str:
    changed = comparison.changed
    if not changed:
        return "Both models decide alike"
    of = comparison.total("compared")
    return f"{count(changed, 'decision')} changed, {percent(changed, of)} of {count(of, 'image')}"


def _findings(comparison: Comparison) -> list[tuple[Tone, str]]:
    """What is worth knowing, the gravest first: there's at least one."""
    findings: list[tuple[Tone, str]] = []
    new, gone = comparison.total("newly_flagged"), comparison.total("no_longer_flagged")
    if gone:
        findings.append(("warning", f"{count(gone, 'image')} no longer flagged."))
    if new:
        findings.append(("notice", f"{count(new, 'image')} newly flagged."))
    reordered = [
        f"{name} ({group.rank_correlation:.2f})"
        for name, group in comparison.groups.items()
        if group.rank_correlation is not None and group.rank_correlation < ENOUGH_CORRELATION
    ]
    if reordered:
        sentence = f"Images come in another order, by rank correlation: {join_some(reordered, 5)}."
        findings.append(("notice", sentence))
    if comparison.left_out:
        names = [f"{name} ({images:,})" for name, images in comparison.left_out.items()]
        sentence = f"Groups that only one model has are left out: {join_some(names, 5)}."
        findings.append(("notice", sentence))
    if failed := comparison.total("listed") - comparison.total("compared"):
        findings.append(("notice", f"{count(failed, 'image')} not scored by both."))
    undecided = [
        name
        for name, group in comparison.groups.items()
        if group.threshold_before is None or group.threshold_after is None
    ]
    if undecided:
        sentence = f"Without thresholds in both, no decisions: {join_some(undecided, 5)}."
        findings.append(("notice", sentence))
    lowest = comparison.lowest_rank_correlation
    if lowest and not reordered:
        where = f", lowest in {lowest[0]}" if len(comparison.groups) > 1 else ""
        findings.append(("fine", f"Rank correlation {lowest[1]:.4f}{where}."))
    return findings or [("notice", "Nothing could be compared.")]


def _chart(both: tuple[Verdicts, Verdicts]) -> Markup | None:
    """Of all images whose decision changed, or many of them, and of a selection of the others."""
    before, after = both
    compared = np.flatnonzero(np.isfinite(before.scores) & np.isfinite(after.scores))
    flipped = before.flags[compared] != after.flags[compared]
    changed = _spread(compared[flipped], before.scores, MOST_POINTS // 2)
    others = _spread(compared[~flipped], before.scores, MOST_POINTS - len(changed))
    shown = np.union1d(changed, others)
    return draw_score_pairs(
        before.scores[shown].astype(float),
        after.scores[shown].astype(float),
        before.flags[shown] != after.flags[shown],
        (before.threshold, after.threshold),
    )


def _spread(rows: np.ndarray, scores: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly by rank: the lowest and the highest are among them."""
    ordered = rows[np.argsort(scores[rows], kind="stable")]
    chosen = np.linspace(0, len(ordered) - 1, min(most, len(ordered)))
    return ordered[chosen.round().astype(int)]


def _image(
    row: Row,
    image: bytes | ImageError | None,
    heat_before: bytes | ImageError | None,
    heat_after: bytes | ImageError | None,
) -> ChangedImage:
    thumbnail, problem = read_picture(image)
    heats = [read_picture(heat) for heat in (heat_before, heat_after)]
    shape = thumbnail or heats[0][0] or heats[1][0]
    sides = {name: (row[f"{name}_before"], row[f"{name}_after"]) for name in _OF_SIDES}
    known = {*_OWN, *(f"{name}_{side}" for name in _OF_SIDES for side in ("before", "after"))}
    before, after = (
        score / threshold if threshold else None
        for score, threshold in zip(sides["score"], sides["threshold"], strict=True)
    )
    return ChangedImage(
        uri=row["uri"],
        group=row["group"],
        captured={k: str(v) for k, v in row.items() if k not in known and v is not None},
        change=row["change"],
        scores=sides["score"],
        ratios=(before, after),
        flags=tuple(map(bool, sides["is_anomalous"])),
        width=row.get("width") or (shape.width if shape else 4),
        height=row.get("height") or (shape.height if shape else 3),
        thumbnail=thumbnail,
        problem=problem,
        heats=tuple(picture for picture, _ in heats),
        heat_problems=tuple(reason for _, reason in heats),
    )
