"""The choice between bfloat16 and float32 on CPUs, given a processor's abilities and speeds."""

import pytest
import torch

from padim_ray.features import bfloat16
from padim_ray.features.trunk import native_precision


@pytest.mark.parametrize(
    ("abilities", "float32", "half", "faster"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 1, 9, True),  # not measured
        ({"avx512_bf16": True}, 2, 1, True),
        ({"avx512_bf16": True}, 1.1, 1, False),  # not worth the rounding
        ({"avx512_bf16": True}, 1, 2, False),
        ({"avx2": True}, 9, 1, False),  # emulated, whatever a noisy measurement says
        ({}, 9, 1, False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(monkeypatch, abilities, float32, half, faster):
    seconds = {torch.float32: float32, torch.bfloat16: half}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    monkeypatch.setattr(bfloat16, "_convolve", seconds.__getitem__)
    bfloat16.is_bfloat16_faster.cache_clear()
    try:
        assert bfloat16.is_bfloat16_faster() is faster
        assert native_precision("cpu") == ("bfloat16" if faster else "float32")
    finally:
        bfloat16.is_bfloat16_faster.cache_clear()


def test_both_types_can_be_measured():
    assert all(bfloat16._convolve(dtype) > 0 for dtype in (torch.float32, torch.bfloat16))
