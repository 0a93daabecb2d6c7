"""Options of `score`, some of which `evaluate` and `compare` share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.failures import KNOWN_CAUSES
from padim_ray.runs.options.common import (
    IMAGES,
    RESULTS,
    RUN,
    JobOptions,
    Options,
    ReportImages,
    check_number,
    check_positive,
    check_share,
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ResultsOptions(Options):
    """Where results are written, and what is in their report."""

    out: Annotated[str, Parameter(group=RESULTS)]
    """Directory of the results: a path or a URI."""

    alpha: Annotated[float, Parameter(group=RESULTS)] = 0.01
    """False-alarm rate: the share of good images that may be called anomalous. Thresholds follow
    from it and the training images' leave-one-out scores."""

    report_images: ReportImages = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        check_number("report_images", self.report_images)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScoringOptions(ResultsOptions, JobOptions):
    """Options of `score` and `evaluate`."""

    threshold: Annotated[float | None, Parameter(group=RESULTS, negative_none="")] = None
    """Score above which an image is anomalous, in all groups. It replaces the thresholds that
    follow from --alpha."""

    pixel_alpha: Annotated[float, Parameter(group=RESULTS)] = 0.001
    """Share of good images' pixels that may be called anomalous. Regions are cut out at the
    threshold that follows from it."""

    min_region_area: Annotated[int, Parameter(group=RESULTS)] = 0
    """Smallest region to report, in pixels of the image."""

    heatmaps: Annotated[Literal["anomalous", "all", "none", "top"], Parameter(group=RESULTS)] = (
        "anomalous"
    )
    """Images that get a heatmap. anomalous: the anomalous images and those in the report. top: the
    images that exceed their threshold most, or come nearest to it."""

    top: Annotated[int, Parameter(group=RESULTS)] = 100
    """Number of heatmaps to draw with --heatmaps top."""

    maps: Annotated[bool, Parameter(group=RESULTS, negative="", show_default=False)] = False
    """Also write every anomaly map as a float32 TIFF."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("top", self.top)
        check_share("pixel_alpha", self.pixel_alpha)
        check_number("min_region_area", self.min_region_area)
        if self.threshold is not None:
            check_number("threshold", self.threshold)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ScoringOptions):
    """Options of `score`."""

    allow_empty: Annotated[bool, Parameter(group=IMAGES, negative="", show_default=False)] = False
    """Make an empty run, with exit code 0, if there are no images. By default that is a mistake
    with exit code 4."""

    retry_failed: Annotated[tuple[str, ...], Parameter(group=RUN, negative="")] = ()
    """Score images again that failed for these causes, as the summary names them: 'fetch: not
    found', or 'fetch' or 'decode' for all of a stage. Reopens a complete run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for cause in self.retry_failed:
            stage = cause.partition(":")[0]
            if stage not in KNOWN_CAUSES:
                raise PadimError(
                    f"--retry-failed {cause!r} names no cause: begin with one of "
                    f"{', '.join(KNOWN_CAUSES)}, as in 'fetch: not found'"
                )
