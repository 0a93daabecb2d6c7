# mypy: disallow-untyped-defs=False
"""Triton kernels for moments and distances of bfloat16 features: one pass over their inputs.

Tensor cores multiply, and sums are float32. Moments are as exact as with float32 products: a
feature's offset from a reference is split into two bfloat16 numbers, high and low, nearly always
without a remainder, and all four products are taken. Without low · low, scatters would be off by up
to 6e-6 of a block's largest entry. Distances round offsets and whitening to float16. That moves
scores by less than 0.1 %, while the bfloat16 features themselves move them by up to 1 %.

Separate operators for splitting, rounding and adding would each read and write several times the
size of the features.

PyTorch's GPU builds bring Triton along. `moments` and `whitening` have the same functions in plain
PyTorch; tests compare the two.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from padim_ray.densities.gaussian.moments import Moments
from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.features.grid import Embeddings
from padim_ray.features.kernels import tensor_core_size

MAX_TILE = 128  # rows and columns, or images, of a program's accumulator
MAX_LEVELS = 4
ALIGNMENT = 16  # elements: Triton specialises on divisibility by 16
STEP = 32  # images or channels per tensor-core product


def accumulate_(moments: Moments, embeddings: Embeddings) -> Moments:
    """Add a batch of images in place, as `moments.accumulate_` does, from bfloat16 embeddings.

    Offsets are taken from the batch's mean rounded to bfloat16, which makes them exact or nearly
    so. The difference between the mean and its rounding is subtracted as a rank-one term.
    """
    batch = len(embeddings)
    count = moments.count + batch
    references, leftovers, deltas = [], [], []
    for mean, level in zip(moments.means, embeddings.levels, strict=True):
        # float64: the rounding of a float32 mean would give a constant channel some scatter
        batch_mean = level.mean(0, dtype=torch.float64)
        reference = batch_mean.to(level.dtype).float()
        delta = batch_mean[:, : mean.shape[1]] - mean
        mean.add_(delta, alpha=batch / count)
        weighted = torch.zeros_like(reference)
        weighted[:, : mean.shape[1]] = delta * (moments.count * batch / count) ** 0.5
        references.append(reference)
        leftovers.append(((batch_mean - reference) * batch**0.5).float())
        deltas.append(weighted)
    for fine, row in enumerate(moments.scatters):
        for k, block in enumerate(row, start=fine):
            cells, columns = references[k].shape
            rows = references[fine].numel() // cells
            tile = min(MAX_TILE, tensor_core_size(rows)), min(MAX_TILE, tensor_core_size(columns))
            tiles = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
            _add_scatter[(cells * tiles,)](
                block,
                embeddings.levels[fine],
                embeddings.levels[k],
                *(vectors[m] for vectors in (references, leftovers, deltas) for m in (fine, k)),
                batch,
                cells,
                rows,
                columns,
                references[fine].shape[1],
                *block.shape[1:],
                *tile,
                STEP,
            )
    return Moments(count, moments.means, moments.scatters)


def align_rows(gaussian: Gaussian) -> Gaussian:
    """Pad the rows of the whitening with zeros in memory: aligned rows load much faster."""

    def align(block: torch.Tensor) -> torch.Tensor:
        channels = block.shape[2]
        if channels % ALIGNMENT == 0:
            return block
        return torch.nn.functional.pad(block, (0, -channels % ALIGNMENT))[..., :channels]

    return replace(gaussian, whitening=tuple(tuple(map(align, row)) for row in gaussian.whitening))


def squared_distances(gaussian: Gaussian, embeddings: Embeddings) -> torch.Tensor:
    """Squared Mahalanobis distances, as `whitening.squared_distances`, of bfloat16 embeddings.

    Args:
        gaussian: means and whitening; padding in memory after the whitening's rows must be zeros,
            as `align_rows` makes it.
        embeddings: of the same cells.

    Returns:
        (P_0, B) float32, in nested order.
    """
    images = len(embeddings)
    # 1 / σ of a typical channel: scaled by it, features of any magnitude fit float16
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
        missing = MAX_LEVELS - len(gaussian.whitening[level])
        out = torch.empty(cells, images, dtype=torch.float32, device=gaussian.means[0].device)
        tile = min(MAX_TILE, tensor_core_size(images))
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
            MAX_LEVELS - missing,
            tile,
            min(MAX_TILE, tensor_core_size(rows)),
            STEP,
        )
        total = out
    assert total is not None
    return total


@triton.jit
def _split(offset):
    """Split a float32 number into the sum of two bfloat16 numbers."""
    high = offset.to(tl.bfloat16)
    return high, (offset - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_scatter(
    block,  # float32: a scatter block, with the rows of one coarse cell's descendants together
    fine,  # (images, cells, rows) bfloat16
    coarse,  # (images, cells, columns) bfloat16
    fine_reference,  # (cells, rows) float32: subtracted from the features
    coarse_reference,  # (cells, columns) float32, and so on
    fine_leftover,  # (batch mean − reference) · √images
    coarse_leftover,
    fine_delta,  # (batch mean − mean so far) · √weight
    coarse_delta,
    images,
    cells,
    rows,
    columns,
    width,  # rows of one fine cell: `row_channels` channels, then padding
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
    features,  # (images, cells, width) bfloat16: channels, then padding
    whitening,  # (…, rows, pitch) float32: channels, then zeros, see `align_rows`
    means,  # (cells, channels) float32
    image,
    is_image,
    row,  # indices among the rows of all cells' whitening
    is_row,
    cell,
    cells,
    channels,
    width,
    pitch,
    stop,  # these rows are zero from this channel on
    scale,  # pointer to the factor that brings offsets into float16's range
    STEP: tl.constexpr,
):
    """Add one level's offsets from the mean, whitened."""
    factor = tl.load(scale)
    for start in range(0, stop, STEP):
        channel = start + tl.arange(0, STEP)
        # the features' padding is multiplied by the zeros that pad the whitening
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
    out,  # (cells, images) float32: squared distances over this level and all coarser ones
    coarser,  # (coarser_cells, images) float32: those over the coarser ones
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
        # the level's own block is triangular
        z = _add_whitened(
            z, features_0, whitening_0, means_0, image, is_image, row, is_row,
            cell, cells_0, channels_0, width_0, pitch_0, min(channels_0, first + ROWS),
            scales, STEP,
        )  # fmt: skip
        total += tl.sum(z * z, axis=1)
    tl.store(out + cell * images + image, total, mask=is_image)
