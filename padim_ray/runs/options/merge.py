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
    """Directory of the merged model: a path or a URI. A model that is there already gets a next
    version, which includes the existing one only if that is also among the merged models."""

    calibrate: Annotated[Literal["readable", "none"], Parameter(group=MODEL)] = "readable"
    """How to calibrate groups that occur in several models. readable: with those images of the
    sample that can be read from here. none: not at all; they have no thresholds and p-values until
    the next update."""
