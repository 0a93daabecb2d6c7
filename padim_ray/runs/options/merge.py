"""Options of `merge`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from padim_ray.runs.options.common import MODEL
from padim_ray.runs.options.fit import RoundOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MergeOptions(RoundOptions):
    """Options of `merge`."""

    model: Annotated[str, Parameter(group=MODEL)]
    """Directory of the merged model: a path, or a URI. If there is a model, this is its next
    version, which has that model's images only if it is among those that are merged."""

    calibrate: Annotated[Literal["readable", "none"], Parameter(group=MODEL)] = "readable"
    """Which images make thresholds and p-values of groups that are in several models. readable:
    those of the sample that can be read from here. none: these groups have none, until an update.
    """
