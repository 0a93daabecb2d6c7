# mypy: disallow-untyped-defs=False
"""Triton kernels for pooling of channels-last maps, in one pass over their input."""

from functools import lru_cache

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


def average(x: torch.Tensor, positions: int, neighbourhood: int) -> torch.Tensor:
    """Average over neighbourhoods and then over cells, see `padim_ray.features.cells`.

    Args:
        x: (B, C, H, W), channels-last.
        positions: side of a cell, in positions.
        neighbourhood: side of the neighbourhood, in positions, odd.

    Returns:
        (B, C, H / positions, W / positions), channels-last, in x's type; sums are float32.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    images, height, width, channels = x.shape
    rows, columns = height // positions, width // positions
    out = x.new_empty(images, rows, columns, channels)
    weights = [_weights(side, positions, neighbourhood, x.device) for side in (height, width)]
    span = positions + neighbourhood - 1
    tile = min(128, tensor_core_size(channels))
    _average[(images * rows * columns, triton.cdiv(channels, tile))](
        x, *weights, out, height, width, rows, columns, channels, positions, neighbourhood // 2,
        span, triton.next_power_of_2(span), tile,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _weights(side: int, positions: int, neighbourhood: int, device: torch.device) -> torch.Tensor:
    """Along one axis, the weights (cells, span) float32 of the positions that a cell averages.

    The first position is `neighbourhood` // 2 before the cell; those outside have weight 0.
    """
    reach = neighbourhood // 2
    cells, span = side // positions, positions + 2 * reach
    weights = torch.zeros(cells, span, dtype=torch.float64)
    for position in range(side):
        cell, offset = divmod(position, positions)
        seen = range(max(0, position - reach), min(side, position + reach + 1))
        first = seen[0] - position + offset + reach
        weights[cell, first : first + len(seen)] += 1 / len(seen) / positions
    return weights.float().to(device)


@triton.jit
def _average(
    x,  # (images, height, width, channels)
    down,  # (rows, span)
    across,  # (columns, span)
    out,  # (images, rows, columns, channels)
    height,
    width,
    rows,
    columns,
    channels,
    positions,
    reach,
    span,
    WIDTH: tl.constexpr,  # span, rounded up to a power of two
    CHANNELS: tl.constexpr,
):
    cell = tl.program_id(0)
    column, line = cell % columns, cell // columns
    row, image = line % rows, line // rows
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (channel < channels)[None, :]
    j = tl.arange(0, WIDTH)
    place = column * positions - reach + j
    is_column = (j < span) & (place >= 0) & (place < width)
    weights = tl.load(across + column * span + j, mask=is_column, other=0.0)
    total = tl.zeros([CHANNELS], tl.float32)
    for i in range(span):
        y = row * positions - reach + i + tl.zeros((WIDTH,), tl.int32)
        pixel = (image.to(tl.int64) * height + y) * width + place
        is_inside = (y >= 0) & (y < height) & is_column
        value = tl.load(
            x + pixel[:, None] * channels + channel[None, :],
            mask=is_inside[:, None] & is_channel,
            other=0.0,
        )
        weight = weights * tl.load(down + row * span + i)
        total += tl.sum(weight[:, None] * value.to(tl.float32), 0)
    tl.store(out + cell.to(tl.int64) * channels + channel, total, mask=channel < channels)
