"""Moments and distances on GPUs, of bfloat16 features, each in one pass over its inputs.

The products are the tensor cores', their sums float32. For moments they are as exact as float32's:
a feature's offset from a reference is split into two bfloat16 numbers, high and low, nearly always
without a rest, and all four products are taken: without low · low, scatters would be off by up to
6e-6 of a block's largest entry. Distances are of offsets and whitening rounded to float16: that
moves scores by less than a thousandth, where bfloat16's features move them by up to a hundredth.

As separate operators, splitting, rounding and adding up would each write and read what is several
times the features again.

Written in Triton, which PyTorch's GPU builds bring along. `moments` and `gaussian` have the plain
forms, which tests compare with.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from padim_ray.densities.gaussian.moments import Moments
from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.features.grid import Embeddings
from padim_ray.features.kernels import tensor_core_size

TILE = 128  # rows and columns, or images, of a program's accumulator, at most
MOST_LEVELS = 4
ALIGNED = 16  # numbers: what Triton knows of an argument is whether they divide it
STEP = 32  # images or channels that a product sums up at once


def accumulate_(moments: Moments, embeddings: Embeddings) -> Moments:
    """As `moments.accumulate_`, of features as they are.

    The batch's reference is its mean rounded to bfloat16, so that offsets from it are exact or
    nearly so; what the rounding leaves is subtracted as a rank-one term.
    """
    batch = len(embeddings)
    count = moments.count + batch
    references, leftovers, deltas = [], [], []
    for mean, level in zip(moments.means, embeddings.levels, strict=True):
        batch_mean = level.mean(0, dtype=torch.float64)  # of a constant channel, float32's shows
        reference = batch_mean.to(level.dtype).float()
        delta = batch_mean[:, : mean.shape[1]] - mean
        mean.add_(delta, alpha=batch / count)
        weighted = torch.zeros_like(reference)
        weighted[:, : mean.shape[1]] = delta * (moments.count * batch / count) ** 0.5
        references.append(reference)
        leftovers.append(((batch_mean - reference) * batch**0.5).float())
        deltas.append(weighted)
    for level, row in enumerate(moments.scatters):
        for k, block in enumerate(row, start=level):
            cells, columns = references[k].shape
            rows = references[level].numel() // cells
            tile = min(TILE, tensor_core_size(rows)), min(TILE, tensor_core_size(columns))
            tiles = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
            _add_scatter[(cells * tiles,)](
                block,
                embeddings.levels[level],
                embeddings.levels[k],
                *(vectors[m] for vectors in (references, leftovers, deltas) for m in (level, k)),
                batch,
                cells,
                rows,
                columns,
                references[level].shape[1],
                *block.shape[1:],
                *tile,
                STEP,
            )
    return Moments(count, moments.means, moments.scatters)


def fill_up(gaussian: Gaussian) -> Gaussian:
    """The same, with the rows of its whitening aligned in memory: wide loads are much faster."""

    def align(block: torch.Tensor) -> torch.Tensor:
        channels = block.shape[2]
        if channels % ALIGNED == 0:
            return block
        return torch.nn.functional.pad(block, (0, -channels % ALIGNED))[..., :channels]

    return replace(gaussian, whitening=tuple(tuple(map(align, row)) for row in gaussian.whitening))


def squared_distances(gaussian: Gaussian, embeddings: Embeddings) -> torch.Tensor:
    """As `gaussian.squared_distances`, of features as they are: (P_0, B) float32.

    Args:
        gaussian: if rows of its whitening are longer in memory than they seem, then by zeros.
    """
    images = len(embeddings)
    # of a typical channel, 1 / σ: features of any scale fit float16
    scales = torch.stack([own.diagonal(dim1=1, dim2=2).mean() for own, *_ in gaussian.whitening])
    total = None
    for level in reversed(range(len(gaussian.means))):
        cells, rows = gaussian.means[level].shape
        pointers, sizes = [], []
        for mean, features, whitening in zip(
            gaussian.means[level:],
            embeddings.levels[level:],
            gaussian.whitening[level],
            strict=True,
        ):
            assert features.is_contiguous() and mean.is_contiguous() and whitening.stride(2) == 1
            pointers += [features, whitening, mean]
            sizes += [*mean.shape, features.shape[2], whitening.stride(1)]
        missing = MOST_LEVELS - len(gaussian.whitening[level])
        out = torch.empty(cells, images, dtype=torch.float32, device=gaussian.means[0].device)
        tile = min(TILE, tensor_core_size(images))
        _measure[(cells * triton.cdiv(images, tile),)](
            out,
            out if total is None else total,
            0 if total is None else len(total),
            images,
            cells,
            rows,
            scales[level:],
            *pointers,
            *pointers[-3:] * missing,
            *sizes,
            *sizes[-4:] * missing,
            MOST_LEVELS - missing,
            tile,
            min(TILE, tensor_core_size(rows)),
            STEP,
        )
        total = out
    assert total is not None
    return total


@triton.jit
def _split(offset):
    """A float32 number as the sum of two bfloat16 ones."""
    high = offset.to(tl.bfloat16)
    return high, (offset - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_scatter(
    block,  # float32: a scatter block, its rows below one coarse cell
    fine,  # (images, cells, rows) bfloat16
    coarse,  # (images, cells, columns) bfloat16
    fine_reference,  # (cells, rows) float32, and so on: what is subtracted from features
    coarse_reference,
    fine_leftover,  # what is left of their mean, times √images
    coarse_leftover,
    fine_delta,  # the batch's mean from the sum's, times the root of its weight
    coarse_delta,
    images,
    cells,
    rows,
    columns,
    width,  # of the rows of one fine cell, of which so many are channels; the rest fills up
    row_channels,
    column_channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * column_tiles
    cell = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < rows
    is_column = column < columns
    fine_cell = cell * rows + row
    coarse_cell = cell * columns + column
    row_reference = tl.load(fine_reference + fine_cell, mask=is_row, other=0.0)
    column_reference = tl.load(coarse_reference + coarse_cell, mask=is_column, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, images, STEP):
        image = (start + tl.arange(0, STEP)).to(tl.int64)
        is_image = image < images
        is_left = is_row[:, None] & is_image[None, :]
        is_right = is_image[:, None] & is_column[None, :]
        left = tl.load(
            fine + image[None, :] * (cells * rows) + fine_cell[:, None], mask=is_left, other=0.0
        )
        right = tl.load(
            coarse + image[:, None] * (cells * columns) + coarse_cell[None, :],
            mask=is_right,
            other=0.0,
        )
        left_high, left_low = _split(
            tl.where(is_left, left.to(tl.float32) - row_reference[:, None], 0.0)
        )
        right_high, right_low = _split(
            tl.where(is_right, right.to(tl.float32) - column_reference[None, :], 0.0)
        )
        total = tl.dot(left_high, right_high, total)
        total = tl.dot(left_high, right_low, total)
        total = tl.dot(left_low, right_high, total)
        total = tl.dot(left_low, right_low, total)
    row_leftover = tl.load(fine_leftover + fine_cell, mask=is_row, other=0.0)
    column_leftover = tl.load(coarse_leftover + coarse_cell, mask=is_column, other=0.0)
    row_delta = tl.load(fine_delta + fine_cell, mask=is_row, other=0.0)
    column_delta = tl.load(coarse_delta + coarse_cell, mask=is_column, other=0.0)
    total -= row_leftover[:, None] * column_leftover[None, :]
    total += row_delta[:, None] * column_delta[None, :]
    block_row = fine_cell // width * row_channels + row % width
    entry = block + block_row[:, None] * column_channels + column[None, :]
    is_entry = (is_row & (row % width < row_channels))[:, None]
    is_entry = is_entry & (column < column_channels)[None, :]
    tl.store(entry, tl.load(entry, mask=is_entry) + total, mask=is_entry)


@triton.jit
def _add_whitened(
    whitened,  # (IMAGES, ROWS) float32
    features,  # (images, cells, width) bfloat16, of which the first are channels
    whitening,  # (…, rows, pitch) float32, the rest zeros: see `fill_up`
    means,  # (cells, channels) float32
    image,
    is_image,
    row,  # of all whitening's rows
    is_row,
    cell,
    cells,
    channels,
    width,
    pitch,
    stop,  # channels from here on have no part in these rows
    scale,  # a pointer to what brings offsets into float16's range
    STEP: tl.constexpr,
):
    """Add the whitened offsets from the mean of one level."""
    factor = tl.load(scale)
    for start in range(0, stop, STEP):
        channel = start + tl.arange(0, STEP)
        # whatever fills up features meets zeros that fill up whitening
        is_feature = is_image[:, None] & (channel < width)[None, :]
        feature = tl.load(
            features + (image[:, None] * cells + cell) * width + channel[None, :],
            mask=is_feature,
            other=0.0,
        )
        mean = tl.load(means + cell * channels + channel, mask=channel < channels, other=0.0)
        weight = tl.load(
            whitening + row[None, :] * pitch + channel[:, None],
            mask=(channel < pitch)[:, None] & is_row[None, :],
            other=0.0,
        )
        offset = tl.where(is_feature, feature.to(tl.float32) - mean[None, :], 0.0) * factor
        whitened = tl.dot(offset.to(tl.float16), (weight / factor).to(tl.float16), whitened)
    return whitened


@triton.jit
def _measure(
    out,  # (cells, images) float32: squared distances in this level and all coarser ones
    coarser,  # (coarser_cells, images): in the coarser ones
    coarser_cells,
    images,
    cells,
    rows,
    scales,  # (LEVELS,)
    features_0,  # of this level: see _add_whitened
    whitening_0,
    means_0,
    features_1,  # of the next coarser one, and so on
    whitening_1,
    means_1,
    features_2,
    whitening_2,
    means_2,
    features_3,
    whitening_3,
    means_3,
    cells_0,
    channels_0,
    width_0,
    pitch_0,
    cells_1,
    channels_1,
    width_1,
    pitch_1,
    cells_2,
    channels_2,
    width_2,
    pitch_2,
    cells_3,
    channels_3,
    width_3,
    pitch_3,
    LEVELS: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    program = tl.program_id(0)
    image_tiles = tl.cdiv(images, IMAGES)
    cell = (program // image_tiles).to(tl.int64)
    image = ((program % image_tiles) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    is_image = image < images
    total = tl.zeros((IMAGES,), tl.float32)
    if LEVELS > 1:
        ancestor = cell // (cells // coarser_cells)
        total += tl.load(coarser + ancestor * images + image, mask=is_image, other=0.0)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < rows
        row = cell * rows + row
        z = tl.zeros((IMAGES, ROWS), tl.float32)
        if LEVELS > 3:
            z = _add_whitened(
                z, features_3, whitening_3, means_3, image, is_image, row, is_row,
                cell // (cells // cells_3), cells_3, channels_3, width_3, pitch_3, channels_3,
                scales + 3, STEP,
            )  # fmt: skip
        if LEVELS > 2:
            z = _add_whitened(
                z, features_2, whitening_2, means_2, image, is_image, row, is_row,
                cell // (cells // cells_2), cells_2, channels_2, width_2, pitch_2, channels_2,
                scales + 2, STEP,
            )  # fmt: skip
        if LEVELS > 1:
            z = _add_whitened(
                z, features_1, whitening_1, means_1, image, is_image, row, is_row,
                cell // (cells // cells_1), cells_1, channels_1, width_1, pitch_1, channels_1,
                scales + 1, STEP,
            )  # fmt: skip
        # its own block is triangular
        z = _add_whitened(
            z, features_0, whitening_0, means_0, image, is_image, row, is_row,
            cell, cells_0, channels_0, width_0, pitch_0, min(channels_0, first + ROWS),
            scales, STEP,
        )  # fmt: skip
        total += tl.sum(z * z, axis=1)
    tl.store(out + cell * images + image, total, mask=is_image)
