"""PaDiM anomaly detection on Ray: exact, distributed, in constant memory."""

import logging
from importlib import import_module
from typing import Any

from padim_ray.errors import ModelError, PadimError
from padim_ray.storage.credentials import RedactingFilter

__all__ = [
    "ModelError",
    "PadimError",
    "PadimModel",
    "compare",
    "convert",
    "evaluate",
    "fit",
    "forget",
    "merge",
    "score",
    "update",
]
__version__ = "0.1.0"

logging.getLogger("padim_ray").addFilter(RedactingFilter())  # imported in every process

# imported on first use: the library works without ray, and decoding tasks without torch
_LAZY = {
    "PadimModel": "model.padim_model",
    **{
        job: f"pipeline.jobs.{job}"
        for job in ("fit", "merge", "convert", "score", "evaluate", "compare")
    },
    **dict.fromkeys(("update", "forget"), "pipeline.jobs.update_and_forget"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
