"""Options of `evaluate`."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import IMAGES
from padim_ray.runs.options.score import ScoringOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Options of `evaluate`."""

    masks: Annotated[str | None, Parameter(group=IMAGES, negative_none="")] = None
    """Masks of the defects, such as 'archive/{group}/ground_truth/{defect}/{name}_mask.png'.
    --images must capture every name that is used here. Without masks there are image metrics only,
    no pixel metrics."""

    normal: Annotated[str, Parameter(group=IMAGES)] = "good"
    """Value of {defect} that marks a good image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks is not None and self.manifest is not None:
            raise PadimError("--masks needs --images; a manifest has a column 'mask_uri' for them")
