# mypy: disallow-untyped-defs=False
"""A Triton kernel for max pooling of channels-last maps, in one pass over its input."""

import torch
import triton
import triton.language as tl


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Max pooling 3×3 with stride 2 and padding 1.

    Args:
        x: (B, C, H, W), channels-last, not negative: padding counts as 0.

    Returns:
        (B, C, ⌈H/2⌉, ⌈W/2⌉), channels-last.
    """
    x = x.permute(0, 2, 3, 1)
    images, height, width, channels = x.shape
    out = x.new_empty(images, (height + 1) // 2, (width + 1) // 2, channels)
    tile = 16
    grid = (images * out.shape[1] * triton.cdiv(out.shape[2], tile),)
    _pool[grid](x, out, height, width, *out.shape[1:], tile, tensor_core_size(channels))
    return out.permute(0, 3, 1, 2)


def tensor_core_size(size: int) -> int:
    """The smallest tensor-core operand that holds `size`: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _pool(
    x,  # (images, height, width, channels)
    out,  # (images, rows, columns, channels)
    height,
    width,
    rows,
    columns,
    channels,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(columns, TILE)
    column = (program % tiles) * TILE + tl.arange(0, TILE)
    line = program // tiles  # index among the rows of all images
    row = line % rows + tl.zeros((TILE,), tl.int32)
    image = (line // rows).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    is_channel = (channel < channels)[None, :]
    highest = tl.zeros((TILE, CHANNELS), x.dtype.element_ty)
    for i in tl.static_range(3):
        y = 2 * row + i - 1
        for j in tl.static_range(3):
            place = 2 * column + j - 1
            is_inside = (y >= 0) & (y < height) & (place >= 0) & (place < width)
            pixel = (image * height + y) * width + place
            value = tl.load(
                x + pixel[:, None] * channels + channel[None, :],
                mask=is_inside[:, None] & is_channel,
                other=0.0,
            )
            highest = tl.maximum(highest, value)
    place = (image * rows + row) * columns + column
    tl.store(
        out + place[:, None] * channels + channel[None, :],
        highest,
        mask=(column < columns)[:, None] & is_channel,
    )
