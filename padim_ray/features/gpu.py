"""Check whether Triton kernels compile and run here."""

import logging
from functools import cache

import torch

log = logging.getLogger("padim_ray")


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels work on this device; Triton needs a C compiler, for example."""
    if device.type != "cuda":
        return False
    try:
        from padim_ray.features import kernels

        ones = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16, device=device)
        kernels.max_pool(ones.to(memory_format=torch.channels_last))
    except (ImportError, RuntimeError, OSError) as error:  # OSError: Triton's cache is read-only
        log.warning("Triton kernels don't work here; the GPU takes up to twice as long: %s", error)
        return False
    return True
