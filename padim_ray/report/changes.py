"""The page of a comparison: agreement of two models, and the images that changed most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from padim_ray.errors import ImageError
from padim_ray.evaluation.agreement import Comparison, GroupComparison, Verdicts
from padim_ray.images.preprocessing import GreyRange
from padim_ray.report.charts import draw_score_pairs
from padim_ray.report.gallery import Picture, encode_pictures, max_pixels, read_picture
from padim_ray.report.page import MAX_BYTES, MAX_CHARTS, MAX_GROUPS, make_filters, render
from padim_ray.report.rows import Row
from padim_ray.report.text import count, join_some, percent
from padim_ray.report.verdict import Tone
from padim_ray.storage.location import Location

MAX_POINTS = 500  # in a chart
MIN_CORRELATION = 0.9  # groups below it are named
_SIDES = ("before", "after")
_PAIRED = ("score", "threshold", "is_anomalous", "p_value")  # columns of both models
_NOT_CAPTURED = {
    *("uri", "group", "size", "version_tag", "change", "width", "height"),
    *("heatmap_before", "heatmap_after"),
    *(f"{name}_{side}" for name in _PAIRED for side in _SIDES),
}


@dataclass(frozen=True)
class ChangedImage:
    """An image with its pictures. Pairs hold a value for the model before and the one after.

    `captured`: the columns that came with the image. `change`: the factor between both scores, each
    relative to its threshold. `ratios`: scores divided by thresholds. `problem`, `heat_problems`:
    why a picture is missing.
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
    regions: tuple[()] = ()  # none are drawn: each model has its own

    @property
    def name(self) -> str:
        """The file name."""
        return self.uri.rpartition("/")[2] or self.uri

    @property
    def is_new(self) -> bool:
        """Whether only the model after flags it."""
        return self.flags[1] and not self.flags[0]

    @property
    def is_gone(self) -> bool:
        """Whether only the model before flags it."""
        return self.flags[0] and not self.flags[1]


def write_changes(
    page: Location,
    comparison: Comparison,
    groups: Mapping[str, tuple[Verdicts, Verdicts]],
    rows: Sequence[Row],
    *,
    storage_options: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
    grey_range: GreyRange | None = None,
) -> None:
    """Write the page of a comparison.

    Args:
        page: where to write it.
        comparison: the figures.
        groups: both models' verdicts, by group.
        rows: rows of compare.parquet, the most changed image first, with the URIs of drawn heatmaps
            in `heatmap_before` and `heatmap_after`.
        storage_options: of the images' storage.
        sources: the URIs to fetch images from, where they differ from the images' URIs.
        grey_range: of grey pixels with more than 8 bits, see `Preprocessing`.
    """
    sources = sources or {}
    pictures = encode_pictures(
        [
            ([sources.get(row["uri"], row["uri"]) for row in rows], storage_options or {}),
            *(([row.get(f"heatmap_{side}") for row in rows], page.options) for side in _SIDES),
        ],
        max_pixels(rows),
        grey_range,
    )
    gallery = [_image(row, *encoded) for row, encoded in zip(rows, pictures, strict=True)]
    html = _render(comparison, groups, gallery)
    while len(html) > MAX_BYTES and gallery:  # a manifest's texts may have any length
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
    tones: list[Tone] = ["warning", "notice", "fine"]
    return render(
        "changes.html",
        comparison=comparison,
        headline=_headline(comparison),
        tone=min((tone for tone, _ in findings), key=tones.index),
        findings=findings,
        charts=[(name, group, _chart(groups[name])) for name, group in ranked[:MAX_CHARTS]],
        other_groups=ranked[MAX_CHARTS : MAX_CHARTS + MAX_GROUPS],
        more_groups=max(0, len(ranked) - MAX_CHARTS - MAX_GROUPS),
        gallery=gallery,
        filters=make_filters(gallery, "decision", [_decision(image) for image in gallery]),
    )


def _decision(image: ChangedImage) -> str:
    if image.is_new:
        return "newly flagged"
    return "no longer flagged" if image.is_gone else "same decision"


def _noteworthiness(item: tuple[str, GroupComparison]) -> tuple[Any, ...]:
    """A sort key: groups with the most changed decisions first, then the least correlated."""
    name, group = item
    flipped = group.newly_flagged + group.no_longer_flagged
    correlation = 1.0 if group.rank_correlation is None else group.rank_correlation
    return -flipped / max(group.compared, 1), correlation, name


def _headline(comparison: Comparison) -> str:
    changed = comparison.changed
    if not changed:
        return "Both models make the same decisions"
    images = comparison.total("compared")
    share = percent(changed, images)
    return f"{count(changed, 'decision')} changed, {share} of {count(images, 'image')}"


def _findings(comparison: Comparison) -> list[tuple[Tone, str]]:
    """Findings as sentences, the gravest first; at least one."""
    findings: list[tuple[Tone, str]] = []
    new, gone = comparison.total("newly_flagged"), comparison.total("no_longer_flagged")
    if gone:
        findings.append(("warning", f"{count(gone, 'image')} no longer flagged."))
    if new:
        findings.append(("notice", f"{count(new, 'image')} newly flagged."))
    reordered = [
        f"{name} ({group.rank_correlation:.2f})"
        for name, group in comparison.groups.items()
        if group.rank_correlation is not None and group.rank_correlation < MIN_CORRELATION
    ]
    if reordered:
        names = join_some(reordered, 5)
        sentence = f"Images rank differently in groups with a low rank correlation: {names}."
        findings.append(("notice", sentence))
    if comparison.left_out:
        left_out = [f"{name} ({images:,})" for name, images in comparison.left_out.items()]
        sentence = f"Groups that only one model has are left out: {join_some(left_out, 5)}."
        findings.append(("notice", sentence))
    if failed := comparison.total("listed") - comparison.total("compared"):
        findings.append(("notice", f"{count(failed, 'image')} not scored by both models."))
    undecided = [
        name
        for name, group in comparison.groups.items()
        if group.threshold_before is None or group.threshold_after is None
    ]
    if undecided:
        names = join_some(undecided, 5)
        sentence = f"Groups without a threshold in both models have no decisions: {names}."
        findings.append(("notice", sentence))
    lowest = comparison.lowest_rank_correlation
    if lowest and not reordered:
        where = f", lowest in {lowest[0]}" if len(comparison.groups) > 1 else ""
        findings.append(("fine", f"Rank correlation {lowest[1]:.4f}{where}."))
    return findings or [("notice", "Nothing could be compared.")]


def _chart(verdicts: tuple[Verdicts, Verdicts]) -> Markup | None:
    """Scores of images whose decision changed and of others, `MAX_POINTS` at most."""
    before, after = verdicts
    compared = np.flatnonzero(np.isfinite(before.scores) & np.isfinite(after.scores))
    flipped = before.flags[compared] != after.flags[compared]
    changed = _sample(compared[flipped], before.scores, MAX_POINTS // 2)
    others = _sample(compared[~flipped], before.scores, MAX_POINTS - len(changed))
    shown = np.union1d(changed, others)
    return draw_score_pairs(
        before.scores[shown].astype(float),
        after.scores[shown].astype(float),
        before.flags[shown] != after.flags[shown],
        (before.threshold, after.threshold),
    )


def _sample(rows: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` rows, evenly spaced by rank, including the lowest and the highest score."""
    ordered = rows[np.argsort(scores[rows], kind="stable")]
    chosen = np.linspace(0, len(ordered) - 1, min(limit, len(ordered)))
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
    pairs = {name: (row[f"{name}_before"], row[f"{name}_after"]) for name in _PAIRED}
    before, after = (
        score / threshold if threshold else None
        for score, threshold in zip(pairs["score"], pairs["threshold"], strict=True)
    )
    was_flagged, is_flagged = pairs["is_anomalous"]
    return ChangedImage(
        uri=row["uri"],
        group=row["group"],
        captured={
            name: str(value)
            for name, value in row.items()
            if name not in _NOT_CAPTURED and value is not None
        },
        change=row["change"],
        scores=pairs["score"],
        ratios=(before, after),
        flags=(bool(was_flagged), bool(is_flagged)),
        width=row.get("width") or (shape.width if shape else 4),
        height=row.get("height") or (shape.height if shape else 3),
        thumbnail=thumbnail,
        problem=problem,
        heats=tuple(picture for picture, _ in heats),
        heat_problems=tuple(reason for _, reason in heats),
    )
