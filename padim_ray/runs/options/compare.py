"""Options of `compare`."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from padim_ray.runs.options.common import RESULTS, ImagesOptions, check_number, check_share


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareOptions(ImagesOptions):
    """Options of `compare`."""

    out: Annotated[str, Parameter(group=RESULTS)]
    """Directory of the comparison: a path or a URI."""

    alpha: Annotated[float, Parameter(group=RESULTS)] = 0.01
    """False-alarm rate, from which both models' thresholds follow."""

    report_images: Annotated[int, Parameter(group=RESULTS)] = 50
    """Images in the report's gallery: those that changed most, with both heatmaps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        check_number("report_images", self.report_images)
