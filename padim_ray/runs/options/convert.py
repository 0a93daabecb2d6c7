"""Options of `convert`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from padim_ray.densities import DENSITIES, check_kind
from padim_ray.runs.options.common import MODEL
from padim_ray.runs.options.fit import RoundOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConvertOptions(RoundOptions):
    """Options of `convert`."""

    density: Annotated[
        str, Parameter(group=MODEL, help=f"Kind of density to convert to: {', '.join(DENSITIES)}.")
    ]

    calibrate: Annotated[Literal["readable", "none"], Parameter(group=MODEL)] = "none"
    """How to calibrate the new version. none: not at all, and no image is read; it has no
    thresholds and p-values until an update. readable: with those training images of the sample
    that can be read from here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.density)
