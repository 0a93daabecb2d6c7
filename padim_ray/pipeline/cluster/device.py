"""The device that an actor computes on: Ray's choice, as far as PyTorch can use it."""

import os
import platform
from dataclasses import dataclass

import torch

from padim_ray.errors import PadimError
from padim_ray.planning.resources import Plan

FAKE_GPUS = "PADIM_RAY_FAKE_GPUS"
"""Environment variable of test nodes that announce GPUs to Ray without having any. Their actors
compute on the CPU."""


@dataclass(frozen=True)
class Device:
    """A device of this process.

    Attributes:
        name: PyTorch's name, "cpu" or "cuda".
        problem: why PyTorch can't use the GPU that Ray assigned; None if it can.
    """

    name: str
    problem: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> "Device":
        """The device of this process.

        If PyTorch can't use the GPU, the device is the CPU with a `problem`, which the actor raises
        when it is called. An error in the actor's constructor would surface as Ray's error.
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
        """Raises: PadimError if PyTorch can't use the GPU that Ray assigned."""
        if self.problem:
            raise PadimError(self.problem)
