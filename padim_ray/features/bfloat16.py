"""Whether bfloat16 pays on this processor."""

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

REPEATS = 8  # of which the fastest counts: others share the processor
WORTH = 1.2  # times float32's speed


@cache
def is_bfloat16_faster() -> bool:
    """Whether this processor convolves bfloat16 numbers faster than float32 ones.

    A matrix unit (AMX) always does. Instructions for vectors alone say little: they are twice as
    fast as float32's on AMD's Zen 4, and half as fast on Intel's Xeons. So a small convolution is
    measured, which takes about 20 ms.
    """
    # torch 2.11 may lack the query
    query = getattr(torch.cpu, "get_capabilities", None)
    capabilities: Mapping[str, Any] = query() if query else {}
    if capabilities.get("amx_bf16"):
        return True
    if not torch.backends.mkldnn.is_available() or not capabilities.get("avx512_bf16"):
        return False
    seconds = {dtype: _convolve(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] > WORTH * seconds[torch.bfloat16]


@torch.inference_mode()
def _convolve(dtype: torch.dtype) -> float:
    """Seconds of a convolution like those of a trunk's first layers."""
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
    image = torch.ones(1, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        layer(image)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
