"""Options of `score`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import RESULTS, JobOptions, check_number, check_share


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JobOptions):
    """Options of `score`."""

    out: Annotated[str, Parameter(group=RESULTS)]
    """Directory of the results: a path or a URI."""

    alpha: Annotated[float, Parameter(group=RESULTS)] = 0.01
    """False-alarm rate: the share of good images that may be called anomalous. Thresholds follow
    from it and from the training images' leave-one-out scores."""

    threshold: Annotated[float | None, Parameter(group=RESULTS, negative_none="")] = None
    """Score above which images are anomalous, for all groups, instead of the thresholds of alpha.
    """

    pixel_alpha: Annotated[float, Parameter(group=RESULTS)] = 0.001
    """Share of good images' pixels that may look anomalous: what regions are cut out with."""

    min_region_area: Annotated[int, Parameter(group=RESULTS)] = 0
    """Smallest region to report of an anomalous image, in pixels of the image."""

    heatmaps: Annotated[Literal["anomalous", "all", "none", "top"], Parameter(group=RESULTS)] = (
        "anomalous"
    )
    """Images to draw heatmaps of. anomalous: those, and what the report shows. top: those that
    exceed their threshold most, or come nearest to it."""

    top: Annotated[int, Parameter(group=RESULTS)] = 100
    """How many heatmaps 'top' means."""

    report_images: Annotated[int, Parameter(group=RESULTS)] = 200
    """Images in the report's gallery: the most anomalous ones."""

    maps: Annotated[bool, Parameter(group=RESULTS, negative="", show_default=False)] = False
    """Also write every anomaly map as a float32 TIFF."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise PadimError(f"--top must be at least 1, but is {self.top}")
        for name in ("alpha", "pixel_alpha"):
            check_share(name, getattr(self, name))
        for name in ("threshold", "min_region_area", "report_images"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
