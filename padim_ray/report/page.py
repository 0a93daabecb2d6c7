"""The page: a run's summary, charts and gallery in one HTML file that needs nothing else."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from padim_ray.errors import PadimError
from padim_ray.report import text
from padim_ray.report.charts import draw_score_histogram, heat_colors
from padim_ray.report.evaluation import summarise_evaluation
from padim_ray.report.gallery import GalleryImage, build_gallery
from padim_ray.report.rows import Row, select_rows
from padim_ray.report.verdict import flagged_share, has_drifted, judge, rank_groups
from padim_ray.storage.location import Location

MAX_BYTES = 15 * 10**6
MOST_IMAGES = 2000  # pictures of more would be too small to see anything
MOST_CHARTS, MOST_GROUPS, MOST_CAUSES, MOST_FAILED = 12, 300, 30, 200
MOST_CHOICES = 30  # in the filter of a captured column
_TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Filter:
    """A choice among the gallery's images: texts, and how many images have each."""

    label: str
    choices: list[tuple[str, int]]
    chosen: list[int | None]
    """Per image of the gallery the number of its choice."""


def write_report(
    root: Location,
    *,
    images: int = 200,
    storage_options: Mapping[str, Any] | None = None,
    parts: Sequence[str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> Location:
    """Write `report.html` into a run's directory, and say where it is.

    Args:
        root: where the run left `run.json`, `results/` and the rest.
        images: how many of the most anomalous images the page shows.
        storage_options: for the images' storage, as for the run.
        parts: names of the results' files that hold the highest scores and the failed images, if
            that is known; else all of them are read.
        sources: what to fetch for an image's URI, where that is something else.

    Raises:
        PadimError: if there is no run, or its files can't be read.
    """
    run = _read_json(root / "run.json")
    if run is None:
        raise PadimError(
            f"{root.uri} holds no finished run (there is no run.json): name the --out of a "
            "score or evaluate job that has ended"
        )
    metrics = _read_json(root / "metrics.json")
    shown = min(images, MOST_IMAGES)
    selection = select_rows(root, highest=shown, failed=MOST_FAILED, parts=parts)
    gallery = build_gallery(selection.highest, root, storage_options or {}, sources)
    failed = selection.failed
    page = _render(run, metrics, gallery, failed, root)
    while len(page) > MAX_BYTES and (
        gallery or failed
    ):  # texts of any length may have come with the manifest
        gallery, failed = gallery[: len(gallery) // 2], failed[: len(failed) // 2]
        page = _render(run, metrics, gallery, failed, root)
    report = root / "report.html"
    report.write(page)
    return report


def _read_json(file: Location) -> dict[str, Any] | None:
    try:
        return json.loads(file.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PadimError(f"{file.uri} is broken: {error}") from error


def _render(
    run: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    gallery: Sequence[GalleryImage],
    failed: Sequence[Row],
    root: Location,
) -> bytes:
    groups = rank_groups(run)
    charts = [
        (
            name,
            group,
            draw_score_histogram(group["histogram"], group["threshold"])
            if group["histogram"]
            else None,
        )
        for name, group in groups[:MOST_CHARTS]
    ]
    return render(
        "page.html",
        run=run,
        verdict=judge(run),
        charts=charts,
        other_groups=groups[MOST_CHARTS : MOST_CHARTS + MOST_GROUPS],
        causes=list(run["failed_by_cause"].items()),
        most_causes=MOST_CAUSES,
        failed=failed,
        gallery=gallery,
        filters=_filters(gallery),
        evaluation=summarise_evaluation(metrics, root) if metrics else None,
        has_drifted=has_drifted,
        flagged_share=flagged_share,
    )


def render(template: str, **content: Any) -> bytes:
    """A page with everything in it, of a template's content."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=text.count,
        percent=text.percent,
        figure=text.figure,
        duration=text.duration,
        moment=text.moment,
    )
    style, script = ((_TEMPLATE / name).read_text() for name in ("style.css", "script.js"))
    html = environment.get_template(template).render(
        content,
        heat_colors=heat_colors(),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return html.encode("utf-8", "replace")


def _filters(gallery: Sequence[GalleryImage]) -> list[Filter]:
    verdicts = {True: "flagged", False: "not flagged", None: "no threshold"}
    return make_filters(gallery, "verdict", [verdicts[image.is_anomalous] for image in gallery])


def make_filters(gallery: Sequence[Any], name: str, verdicts: Sequence[str]) -> list[Filter]:
    """By group, by verdict, and by each captured column that has few values.

    Args:
        gallery: images with `group` and `captured`.
        name: what their verdicts are called.
    """
    columns = dict.fromkeys(name for image in gallery for name in image.captured)
    values = [
        ("group", [image.group for image in gallery]),
        (name, list(verdicts)),
        *((name, [image.captured.get(name) for image in gallery]) for name in columns),
    ]
    filters = []
    for label, chosen in values:
        counts = Counter(value for value in chosen if value is not None)
        if len(counts) > 1 and (label == "group" or len(counts) <= MOST_CHOICES):
            numbers = {value: number for number, value in enumerate(sorted(counts))}
            choices = [(value, counts[value]) for value in numbers]
            filters.append(Filter(label, choices, [numbers.get(value) for value in chosen]))
    return filters
