"""Where an actor computes: what Ray gave it, as far as PyTorch can use it."""

import os
import platform
from dataclasses import dataclass

import torch

from padim_ray.errors import PadimError
from padim_ray.planning.resources import Plan

FAKE_GPUS = "PADIM_RAY_FAKE_GPUS"
"""Set on nodes of tests, which tell Ray of GPUs that they don't have: their actors compute on the
CPU."""


@dataclass(frozen=True)
class Device:
    """PyTorch's name of a device, and what is wrong with it."""

    name: str
    problem: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> "Device":
        """The device of the process that asks.

        With a problem it is the CPU, so that an actor can be made and raise it when it is called:
        an error in its constructor would kill it, and then be Ray's error.
        """
        if plan.device == "cpu" or os.environ.get(FAKE_GPUS):
            return cls("cpu")
        if torch.cuda.is_available():
            return cls("cuda")
        return cls(
            "cpu",
            f"Ray has a GPU on {platform.node()}, but PyTorch {torch.__version__} can't use it: "
            "install PyTorch for its CUDA and driver there, or compute on CPUs with --gpus 0",
        )

    def check(self) -> None:
        """Raises: PadimError if Ray's GPU is none for PyTorch."""
        if self.problem:
            raise PadimError(self.problem)
