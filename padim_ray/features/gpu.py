"""Whether a GPU's own kernels can be compiled and run here."""

import logging
from functools import cache

import torch

log = logging.getLogger("padim_ray")


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels written in Triton work on this device; Triton wants a C compiler."""
    if device.type != "cuda":
        return False
    try:
        from padim_ray.features import kernels

        ones = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16, device=device)
        kernels.max_pool(ones.to(memory_format=torch.channels_last))
    except (ImportError, RuntimeError, OSError) as error:  # its cache may not be writable
        log.warning("Without Triton's kernels a GPU takes up to twice as long: %s", error)
        return False
    return True
