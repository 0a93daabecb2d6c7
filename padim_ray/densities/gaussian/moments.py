"""Moments of embeddings in nested blocks: mergeable and subtractable.

Nearest-neighbour alignment (PaDiM, section 3.1) repeats a coarse cell over all the patches that it
covers, so the coarse rows and columns of the covariance are equal at all those patches. They are
stored once, on the coarse level's own grid.

The scatter block of levels (ℓ, k), k ≥ ℓ, is Σ (x_ℓ − μ_ℓ)(x_k − μ_k)ᵀ at every cell of level ℓ,
where x_k belongs to the cell's ancestor at level k. Cells are in nested order (see
`padim_ray.features.grid`), so each block is one batched matrix product over level k's cells, and
nothing is repeated in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from padim_ray.densities.base import Named, Statistics
from padim_ray.features import gpu
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.workers import ONE_BY_ONE, Workers

Blocks = tuple[tuple[torch.Tensor, ...], ...]
"""For every level ℓ, its blocks with the levels k ≥ ℓ, each (P_ℓ, c_ℓ, c_k)."""


@dataclass(frozen=True)
class Moments(Statistics):
    """Count, means and scatters over any run of coarsest cells with their descendants.

    Attributes:
        count: n, the number of images.
        means: per level (P_ℓ, c_ℓ), float64.
        scatters: centred sums of outer products, not divided by n − 1. They are float32 while
            images are added and in files, and float64 while moments are merged.
    """

    count: int
    means: tuple[torch.Tensor, ...]
    scatters: Blocks

    @property
    def levels(self) -> int:
        return len(self.means)

    @property
    def named(self) -> dict[str, torch.Tensor]:
        return name_levels("mean", self.means) | name_blocks("scatter", self.scatters)

    def like(self, named: Named) -> "Moments":
        return Moments.of_named(self.count, named)

    @classmethod
    def of_named(cls, count: int, named: Named) -> "Moments":
        """The inverse of `named`."""
        means = read_levels("mean", named)
        return cls(count, means, read_blocks("scatter", named, len(means)))

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors to save; of symmetric blocks only the lower triangle.

        Scatters are saved in float32, which rounds them no more than adding images already has.
        """
        return {
            "count": torch.tensor(self.count),
            **name_levels("mean", self.means),
            **pack_blocks("scatter", self.to(torch.float32).scatters),
        }

    @classmethod
    def of_packed(cls, packed: Named) -> "Moments":
        """The inverse of `packed`."""
        means = read_levels("mean", packed)
        channels = [mean.shape[1] for mean in means]
        scatters = unpack_blocks("scatter", packed, channels, symmetric=True)
        return cls(int(packed["count"]), means, scatters)

    def to(self, target: torch.dtype | torch.device | str) -> "Moments":
        """Copy to another device, or convert the scatters to another type."""
        is_type = isinstance(target, torch.dtype)
        return Moments(
            self.count,
            self.means if is_type else tuple(mean.to(target) for mean in self.means),
            tuple(tuple(block.to(target) for block in row) for row in self.scatters),
        )

    def double(self) -> "Moments":
        return self.to(torch.float64)

    @torch.inference_mode()
    def add_(self, embeddings: Embeddings, workers: Workers = ONE_BY_ONE) -> "Moments":
        if embeddings.are_bfloat16_on(gpu.has_kernels):
            from padim_ray.densities.gaussian import kernels

            return kernels.accumulate_(self, embeddings)

        def accumulate(run: tuple[int, int]) -> None:
            accumulate_(self.cells(*run), embeddings.patches(*run))

        workers.map(accumulate, embeddings.runs())
        return replace(self, count=self.count + len(embeddings))

    def __add__(self, other: "Moments") -> "Moments":
        return merge(self, other)

    def __sub__(self, other: "Moments") -> "Moments":
        return subtract(self, other)


def cut_cells(
    tensors: Sequence[torch.Tensor], coarsest: int, start: int, stop: int
) -> list[torch.Tensor]:
    """The descendants of the cells [start, stop) of a level of `coarsest` cells, as views."""
    return [
        tensor[start * len(tensor) // coarsest : stop * len(tensor) // coarsest]
        for tensor in tensors
    ]


def empty_moments(
    cells: Sequence[int],
    channels: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Moments:
    """Moments of no images, for P_ℓ `cells` and c_ℓ `channels` per level, finest first."""
    levels = range(len(cells))
    return Moments(
        0,
        tuple(
            torch.zeros(cells[m], channels[m], dtype=torch.float64, device=device) for m in levels
        ),
        tuple(
            tuple(
                torch.zeros(cells[m], channels[m], channels[k], dtype=dtype, device=device)
                for k in levels[m:]
            )
            for m in levels
        ),
    )


def accumulate_(moments: Moments, patches: Sequence[torch.Tensor]) -> Moments:
    """Add a batch of images, in place in the tensors of `moments`.

    Args:
        moments: moments of the images so far.
        patches: per level (P_ℓ, c_ℓ, B), in nested order and in the scatters' type.

    Returns:
        The new moments, which share the argument's tensors.

    The batch is centred on its own mean, since Σxxᵀ − nμμᵀ loses digits, and merged by the formula
    of Chan, Golub and LeVeque (1983), whose rank-one term is one more column of the matrix product.
    The mean is computed from offsets to the batch's first image: features are often much larger
    than their deviations, and the rounding of a float32 mean would show in the rank-one term.
    """
    batch = patches[0].shape[-1]
    count = moments.count + batch
    centred = []
    for mean, x in zip(moments.means, patches, strict=True):
        columns = torch.empty(*x.shape[:-1], batch + 1, dtype=x.dtype, device=x.device)
        offsets = torch.sub(x, x[..., :1], out=columns[..., :batch])
        mean_offset = offsets.mean(-1)
        offsets.sub_(mean_offset[..., None])
        delta = x[..., 0].double() + mean_offset - mean
        columns[..., batch] = delta * (moments.count * batch / count) ** 0.5
        mean.add_(delta, alpha=batch / count)
        centred.append(columns)
    for level, row in enumerate(moments.scatters):
        for block, coarse in zip(row, centred[level:], strict=True):
            per_coarse_cell(block, len(coarse)).baddbmm_(
                per_coarse_cell(centred[level], len(coarse)), coarse.mT
            )
    return Moments(count, moments.means, moments.scatters)


def per_coarse_cell(tensor: torch.Tensor, coarse_cells: int) -> torch.Tensor:
    """View (P_ℓ, c_ℓ, n) as (P_k, descendants · c_ℓ, n), grouped by coarse cell."""
    cells, rows, columns = tensor.shape
    return tensor.view(coarse_cells, cells // coarse_cells * rows, columns)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of images (Chan, Golub and LeVeque 1983)."""
    count = a.count + b.count
    if count == 0:
        return a
    deltas = [mean_b - mean_a for mean_a, mean_b in zip(a.means, b.means, strict=True)]
    means = tuple(
        mean + delta * (b.count / count) for mean, delta in zip(a.means, deltas, strict=True)
    )
    return Moments(count, means, _add_scatters(a, b, 1, deltas, a.count * b.count / count))


def subtract(total: Moments, part: Moments) -> Moments:
    """Moments of the images of `total` that aren't in `part`: `merge`, solved for one side.

    Raises:
        ValueError: if `part` counts more images than `total`.
    """
    count = total.count - part.count
    if count < 0:
        raise ValueError(f"can't subtract {part.count} images from {total.count}")
    if count == 0:
        cells = [len(mean) for mean in total.means]
        channels = [mean.shape[1] for mean in total.means]
        like = total.means[0]
        return empty_moments(cells, channels, dtype=like.dtype, device=like.device)
    means = tuple(
        mean + (mean - part_mean) * (part.count / count)
        for mean, part_mean in zip(total.means, part.means, strict=True)
    )
    deltas = [part_mean - mean for mean, part_mean in zip(means, part.means, strict=True)]
    weight = -count * part.count / total.count
    return Moments(count, means, _add_scatters(total, part, -1, deltas, weight))


def _add_scatters(
    a: Moments, b: Moments, sign: int, deltas: Sequence[torch.Tensor], weight: float
) -> Blocks:
    rows = []
    for level, (row_a, row_b) in enumerate(zip(a.scatters, b.scatters, strict=True)):
        row = []
        for block_a, block_b, coarse in zip(row_a, row_b, deltas[level:], strict=True):
            block = torch.add(block_a, block_b, alpha=sign)
            fine = per_coarse_cell(deltas[level][..., None], len(coarse))
            outer = torch.bmm(fine, coarse[:, None]).mul_(weight)
            per_coarse_cell(block, len(coarse)).add_(outer)
            row.append(block)
        rows.append(tuple(row))
    return tuple(rows)


def scatter_elements(grid: PatchGrid) -> int:
    """Number of elements of all unpacked scatter blocks, or of all whitening blocks."""
    columns = [sum(grid.channels[level:]) for level in range(grid.levels)]
    return sum(p * c * d for p, c, d in zip(grid.cells, grid.channels, columns, strict=True))


def name_levels(name: str, levels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the levels' tensors `name`.0, `name`.1, …"""
    return {f"{name}.{level}": tensor for level, tensor in enumerate(levels)}


def name_blocks(name: str, blocks: Blocks) -> dict[str, torch.Tensor]:
    """Name the blocks `name`.ℓ.k."""
    return {
        f"{name}.{level}.{k}": block
        for level, row in enumerate(blocks)
        for k, block in enumerate(row, start=level)
    }


def read_blocks(name: str, tensors: Mapping[str, torch.Tensor], levels: int) -> Blocks:
    """The inverse of `name_blocks`."""
    return tuple(
        tuple(tensors[f"{name}.{level}.{k}"] for k in range(level, levels))
        for level in range(levels)
    )


def read_levels(name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The inverse of `name_levels`."""
    levels = sum(key.startswith(f"{name}.") for key in tensors)
    return tuple(tensors[f"{name}.{level}"] for level in range(levels))


def pack_blocks(name: str, blocks: Blocks) -> dict[str, torch.Tensor]:
    """Name the blocks `name`.ℓ.k, and pack each level's own block to its lower triangle."""
    packed = {}
    for level, (own, *cross) in enumerate(blocks):
        triangle = own.new_empty(len(own), own.shape[1] * (own.shape[1] + 1) // 2)
        for row, columns in _triangle(own.shape[1]):  # much faster than indexing by all entries
            triangle[:, columns] = own[:, row, : row + 1]
        packed[f"{name}.{level}.{level}"] = triangle
        for k, block in enumerate(cross, start=level + 1):
            packed[f"{name}.{level}.{k}"] = block.contiguous()
    return packed


def _triangle(size: int) -> Iterator[tuple[int, slice]]:
    """The rows of a lower triangle, and each row's place among the packed entries."""
    for row in range(size):
        yield row, slice(row * (row + 1) // 2, (row + 1) * (row + 2) // 2)


def unpack_blocks(
    name: str, tensors: Mapping[str, torch.Tensor], channels: Sequence[int], *, symmetric: bool
) -> Blocks:
    """The inverse of `pack_blocks`.

    Args:
        symmetric: whether the upper triangle mirrors the lower one; otherwise it is zero.
    """
    blocks = []
    for level, size in enumerate(channels):
        packed = tensors[f"{name}.{level}.{level}"]
        own = packed.new_zeros(len(packed), size, size)
        for row, columns in _triangle(size):
            own[:, row, : row + 1] = packed[:, columns]
        if symmetric:
            own += own.mT.triu(1)
        cross = (tensors[f"{name}.{level}.{k}"] for k in range(level + 1, len(channels)))
        blocks.append((own, *cross))
    return tuple(blocks)
