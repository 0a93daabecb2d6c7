"""PaDiM anomaly detection on Ray: exact, distributed, in constant memory."""

from typing import Any

from padim_ray.errors import ModelError, PadimError
from padim_ray.model import PadimModel

__all__ = ["ModelError", "PadimError", "PadimModel", "fit", "score"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # the jobs import ray, which the library must do without
    if name == "fit":
        from padim_ray.pipeline.fit import fit

        return fit
    if name == "score":
        from padim_ray.pipeline.score import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
