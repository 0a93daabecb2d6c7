"""Options of `compare`."""

from dataclasses import dataclass

from cyclopts import Parameter

from padim_ray.runs.options.common import ImagesOptions, ReportImages
from padim_ray.runs.options.score import ResultsOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareOptions(ResultsOptions, ImagesOptions):
    """Options of `compare`."""

    report_images: ReportImages = 50
