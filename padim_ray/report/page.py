"""The page of a run: summary, charts and gallery in one self-contained HTML file."""

import base64
import hashlib
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
from padim_ray.report.run_file import read_metrics, read_run
from padim_ray.report.verdict import flagged_share, has_drifted, judge, rank_groups
from padim_ray.storage.location import Location

MAX_BYTES = 15 * 10**6
MAX_IMAGES = 2000  # with more, the pictures would be too small to be of use
MAX_CHARTS, MAX_GROUPS, MAX_CAUSES, MAX_FAILED = 12, 300, 30, 200
MAX_CHOICES = 30  # captured columns with more values get no filter
_TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Filter:
    """A drop-down list that filters the gallery.

    `choices`: values, and how many images have each. `chosen`: the index of each image's value in
    `choices`.
    """

    label: str
    choices: list[tuple[str, int]]
    chosen: list[int | None]


def write_report(
    root: Location,
    *,
    images: int = 200,
    storage_options: Mapping[str, Any] | None = None,
    parts: Sequence[str] | None = None,
    sources: Mapping[str, str] | None = None,
    places: Sequence[Location] | None = None,
) -> Location:
    """Write `report.html` into a run's directory, and return its location.

    Args:
        root: the run's directory, with `run.json` and `results/`.
        images: how many of the most anomalous images the page shows.
        storage_options: of the images' storage, as for the run.
        parts: names of the results files that hold the highest scores and the failed images; None
            reads all of them.
        sources: the URIs to fetch images from, where they differ from the images' URIs.
        places: directories that images are read from. Default: wherever the results say, which is
            for a run that this process has made.

    Raises:
        PadimError: if there is no finished run, or its files can't be read.
    """
    run = read_run(root)
    if run is None:
        raise PadimError(
            f"{root.uri} holds no finished run (there is no run.json): give the --out of a "
            "finished score or evaluate job"
        )
    metrics = read_metrics(root)
    shown = min(images, MAX_IMAGES)
    selection = select_rows(root, highest=shown, failed=MAX_FAILED, parts=parts)
    gallery = build_gallery(
        selection.highest, root, storage_options or {}, sources, places, run["grey_range"]
    )
    failed = selection.failed
    page = _render(run, metrics, gallery, failed, root)
    while len(page) > MAX_BYTES and (gallery or failed):  # a manifest's texts may have any length
        gallery, failed = gallery[: len(gallery) // 2], failed[: len(failed) // 2]
        page = _render(run, metrics, gallery, failed, root)
    report = root / "report.html"
    report.write(page)
    return report


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
        for name, group in groups[:MAX_CHARTS]
    ]
    return render(
        "page.html",
        run=run,
        verdict=judge(run),
        charts=charts,
        other_groups=groups[MAX_CHARTS : MAX_CHARTS + MAX_GROUPS],
        causes=list(run["failed_by_cause"].items()),
        max_causes=MAX_CAUSES,
        failed=failed,
        gallery=gallery,
        filters=_filters(gallery),
        evaluation=summarise_evaluation(metrics, root) if metrics else None,
        has_drifted=has_drifted,
        flagged_share=flagged_share,
    )


def render(template: str, **content: Any) -> bytes:
    """Render a template with the styles and scripts of all pages, as UTF-8."""
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


def make_filters(gallery: Sequence[Any], label: str, verdicts: Sequence[str]) -> list[Filter]:
    """Filters by group, by verdict, and by each captured column that has few values.

    Args:
        gallery: images with `group` and `captured`.
        label: of the filter by verdict.
        verdicts: the verdict on each image, as text.
    """
    columns = dict.fromkeys(name for image in gallery for name in image.captured)
    values = [
        ("group", [image.group for image in gallery]),
        (label, list(verdicts)),
        *((name, [image.captured.get(name) for image in gallery]) for name in columns),
    ]
    filters = []
    for name, chosen in values:
        counts = Counter(value for value in chosen if value is not None)
        if len(counts) > 1 and (name == "group" or len(counts) <= MAX_CHOICES):
            indices = {value: index for index, value in enumerate(sorted(counts))}
            choices = [(value, counts[value]) for value in indices]
            filters.append(Filter(name, choices, [indices.get(value) for value in chosen]))
    return filters
