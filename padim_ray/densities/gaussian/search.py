"""Distances of cells' embeddings to the Gaussians of other cells, also with an image left out.

A part that lies a few pixels off has its features in a neighbouring cell. Measured against the
Gaussians of the cells around it, it is normal there.

Leaving image i out of the Gaussian at cell q, in the notation of `leave_one_out`: the image's own
embedding at q, d = x_q − μ_q, is taken out of it. That moves the mean to μ_q − d/(n−1), so the
embedding x_p of another cell is y = x_p − μ_q + d/(n−1) away from it. With A = B − E and
κ = a′c, the covariance without the image is A − κ·ddᵀ, and by Sherman and Morrison's formula

    M² = yᵀA⁻¹y + κ(yᵀA⁻¹d)² / (1 − κ·dᵀA⁻¹d).

At p = q this is `leave_one_out`'s formula.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from padim_ray.densities.gaussian.leave_one_out import (
    MIN_DENOMINATOR,
    Removal,
    correction_of,
    next_change,
    steps_and_tolerance,
)
from padim_ray.densities.gaussian.regularization import Regularization
from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.features.grid import Embeddings

MAX_VECTOR_ELEMENTS = 2**24
"""Numbers in the vectors that are measured together. Leaving images out takes several times that.
"""


@dataclass(frozen=True)
class _Pairs:
    """Pairs of an embedding and a Gaussian, sorted by the Gaussian's cell.

    Attributes:
        vectors: row of each pair's embedding.
        cells: cell of each pair's Gaussian on the finest grid, in nested order.
    """

    vectors: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def of(cls, around: torch.Tensor) -> "_Pairs":
        """Pairs of embeddings n with the cells around[n]; negative cells are left out."""
        vectors, columns = (around >= 0).nonzero(as_tuple=True)
        cells, order = around[vectors, columns].sort(stable=True)
        return cls(vectors[order], cells)

    def by_cell(self) -> Iterator[tuple[int, slice]]:
        """Yield cells and their pairs."""
        cells, counts = self.cells.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0).tolist()
        for cell, start, stop in zip(cells.tolist(), [0, *stops], stops, strict=False):
            yield cell, slice(start, stop)


def squared_distances_to_nearest(
    gaussian: Gaussian,
    embeddings: Embeddings,
    images: torch.Tensor,
    cells: torch.Tensor,
    around: torch.Tensor,
    left_out_of: int | None,
    regularization: Regularization,
) -> torch.Tensor:
    """Squared Mahalanobis distances of some cells to the nearest of several cells' Gaussians.

    Args:
        gaussian: of all cells.
        embeddings: of a batch of images.
        images: (N,), which image each embedding is of.
        cells: (N,), its cell on the finest grid, in nested order.
        around: (N, K), the cells of the Gaussians; -1: none.
        left_out_of: see `Density.distances`.
        regularization: the one that the Gaussians were fitted with.

    Returns:
        (N,) float32.
    """
    channels = sum(embeddings.channels)
    step = max(1, MAX_VECTOR_ELEMENTS // (around.shape[1] * channels))
    parts = [slice(start, start + step) for start in range(0, len(cells), step)]
    found = [
        _nearest(
            _Field(gaussian, embeddings),
            *(images[part], cells[part], around[part]),
            *(left_out_of, regularization),
        )
        for part in parts
    ]
    return torch.cat(found) if found else cells.new_empty(0, dtype=torch.float32)


def _nearest(
    field: "_Field",
    images: torch.Tensor,
    cells: torch.Tensor,
    around: torch.Tensor,
    left_out_of: int | None,
    regularization: Regularization,
) -> torch.Tensor:
    pairs = _Pairs.of(around)
    owners = images[pairs.vectors]
    offsets = field.embeddings_at(owners, cells[pairs.vectors]) - field.means_at(pairs.cells)
    if left_out_of is None:
        squared = field.whiten(pairs, offsets).square_().sum(1)
    else:
        own = field.embeddings_at(owners, pairs.cells) - field.means_at(pairs.cells)
        offsets += own / (left_out_of - 1)
        squared = _left_out(field, pairs, owners, offsets, own, left_out_of, regularization)
    nearest = squared.new_full((len(cells),), torch.inf)
    return nearest.scatter_reduce_(0, pairs.vectors, squared, "amin")


def _left_out(
    field: "_Field",
    pairs: _Pairs,
    owners: torch.Tensor,
    offsets: torch.Tensor,
    own: torch.Tensor,
    count: int,
    regularization: Regularization,
) -> torch.Tensor:
    """M² of each pair; see this module's first lines."""
    remove = Removal(count, regularization.scale(count - 1))
    max_steps, tolerance = steps_and_tolerance(count, regularization)
    both = torch.stack([offsets, own])  # (2, pairs, channels): y and d

    def precondition(vectors: torch.Tensor) -> torch.Tensor:
        whitened = [field.whiten(pairs, part) for part in vectors]
        return torch.stack([field.unwhiten(pairs, part) for part in whitened]).mul_(remove.unscaled)

    def squared(solved: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
        (y_y, d_d), y_d = solved, (offsets * solution[1]).sum(1)
        factor = remove.scale * remove.share
        return y_y + factor * y_d.square() / (1 - factor * d_d).clamp_(min=MIN_DENOMINATOR)

    solution = precondition(both)
    if not max_steps:
        return squared((both * solution).sum(2), solution)
    used, owner = owners.unique(return_inverse=True)
    correction = correction_of(field.offsets_of(used), count, regularization)

    def apply_correction(vectors: torch.Tensor) -> torch.Tensor:
        if isinstance(correction, float):
            return correction * vectors
        result = torch.empty_like(vectors)
        for image in range(len(used)):
            rows = (owner == image).nonzero().flatten()
            result[:, rows] = vectors[:, rows] @ correction[image]
        return result

    return _conjugate_gradients(
        both, solution, precondition, apply_correction, squared, max_steps, tolerance
    )


def _conjugate_gradients(
    right: torch.Tensor,
    direction: torch.Tensor,
    precondition: Callable[[torch.Tensor], torch.Tensor],
    apply_correction: Callable[[torch.Tensor], torch.Tensor],
    squared: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    max_steps: int,
    tolerance: float,
) -> torch.Tensor:
    """Solve (B − E)·s = right for every vector, preconditioned by B⁻¹, until M² has converged."""
    residual, from_b = right.clone(), right.clone()  # B · direction, by a recursion
    product = (residual * direction).sum(2)
    tiny = torch.finfo(product.dtype).tiny  # products are 0 where an embedding equals the mean
    solved, solution = torch.zeros_like(product), torch.zeros_like(right)
    found = squared(product, direction)
    change: float | None = None
    for step in range(max_steps):
        image = from_b - apply_correction(direction)
        length = product / (direction * image).sum(2).clamp_(min=tiny)
        solved += length * product
        solution += length[..., None] * direction
        before, found = found, squared(solved, solution)
        distances = found.clamp(min=tiny).sqrt()
        last = change
        change = float(((before.clamp(min=tiny).sqrt() - distances).abs() / distances).max())
        if next_change(change, last) <= tolerance or step == max_steps - 1:
            break
        residual -= length[..., None] * image
        conditioned = precondition(residual)
        previous, product = product, (residual * conditioned).sum(2)
        ratio = (product / previous.clamp_(min=tiny))[..., None]
        direction = conditioned.addcmul_(ratio, direction)
        from_b = from_b.mul_(ratio).add_(residual)
    return found


class _Field:
    """Vectors of all channels, finest level's first, at cells of the finest grid."""

    def __init__(self, gaussian: Gaussian, embeddings: Embeddings) -> None:
        self.gaussian, self.embeddings = gaussian, embeddings
        self._cells = [len(mean) for mean in gaussian.means]
        starts = accumulate((mean.shape[1] for mean in gaussian.means), initial=0)
        self._columns = [slice(*bounds) for bounds in pairwise(starts)]

    def _ancestors(self, cells: torch.Tensor, level: int) -> torch.Tensor:
        return cells // (self._cells[0] // self._cells[level])

    def embeddings_at(self, images: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """(N, channels) float32."""
        levels = zip(self.embeddings.levels, self.embeddings.channels, strict=True)
        parts = [
            level[images, self._ancestors(cells, number)][:, :channels].float()
            for number, (level, channels) in enumerate(levels)
        ]
        return torch.cat(parts, 1)

    def means_at(self, cells: torch.Tensor) -> torch.Tensor:
        """(N, channels)."""
        means = enumerate(self.gaussian.means)
        return torch.cat([mean[self._ancestors(cells, level)] for level, mean in means], 1)

    def offsets_of(self, images: torch.Tensor) -> list[torch.Tensor]:
        """All cells' embeddings less the means, per level (P_ℓ, images, c_ℓ)."""
        patches = self.embeddings[images].patches()
        return [
            (x - mean[..., None]).mT for x, mean in zip(patches, self.gaussian.means, strict=True)
        ]

    def whiten(self, pairs: _Pairs, vectors: torch.Tensor) -> torch.Tensor:
        """W·v of every pair."""
        result = torch.zeros_like(vectors)
        for rows, level, column, block in self._blocks(pairs):
            result[rows, self._columns[level]].addmm_(vectors[rows, column], block.mT)
        return result

    def unwhiten(self, pairs: _Pairs, vectors: torch.Tensor) -> torch.Tensor:
        """Wᵀ·v of every pair."""
        result = torch.zeros_like(vectors)
        for rows, level, column, block in self._blocks(pairs):
            result[rows, column].addmm_(vectors[rows, self._columns[level]], block)
        return result

    def _blocks(self, pairs: _Pairs) -> Iterator[tuple[slice, int, slice, torch.Tensor]]:
        """Yield a cell's pairs, a level, the columns that its block multiplies, and the block."""
        for cell, rows in pairs.by_cell():
            for level, row in enumerate(self.gaussian.whitening):
                ancestor = cell // (self._cells[0] // self._cells[level])
                for column, block in zip(self._columns[level:], row, strict=True):
                    yield rows, level, column, block[ancestor]
