"""A Gaussian per cell: factorise regularised covariances and compute distances, coarse to fine.

With the coarsest channels first, the leading blocks of a cell's Cholesky factor depend on its
ancestors only, so all descendants of an ancestor share them, as they share scatter blocks. The
inverse factor is stored, the whitening W with WᵀW = Σ⁻¹, in the same nested blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from padim_ray.densities.base import Fitted, Named
from padim_ray.densities.gaussian.moments import (
    Blocks,
    Moments,
    name_blocks,
    name_levels,
    pack_blocks,
    per_coarse_cell,
    read_blocks,
    read_levels,
    unpack_blocks,
)
from padim_ray.errors import ModelError
from padim_ray.features.grid import split_cells

MAX_RUN_ELEMENTS = 2**20  # of the scatters that are factorised at once: 8 MiB in float64


@dataclass(frozen=True)
class Gaussian(Fitted):
    """The Gaussians of some cells, in nested order, finest level first.

    Attributes:
        means: per level (P_ℓ, c_ℓ).
        whitening: blocks (P_ℓ, c_ℓ, c_k); each level's own block is lower triangular.
    """

    means: tuple[torch.Tensor, ...]
    whitening: Blocks

    @property
    def named(self) -> dict[str, torch.Tensor]:
        return name_levels("mean", self.means) | name_blocks("whitening", self.whitening)

    def like(self, named: Named) -> "Gaussian":
        return Gaussian.of_named(named)

    @classmethod
    def of_named(cls, named: Named) -> "Gaussian":
        """The inverse of `named`."""
        means = read_levels("mean", named)
        return cls(means, read_blocks("whitening", named, len(means)))

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors to save; of triangular blocks only the lower triangle."""
        return name_levels("mean", self.means) | pack_blocks("whitening", self.whitening)

    @classmethod
    def of_packed(cls, packed: Named) -> "Gaussian":
        """The inverse of `packed`.

        Raises:
            ModelError: if the diagonal of a whitening is not positive.
        """
        means = read_levels("mean", packed)
        channels = [mean.shape[1] for mean in means]
        whitening = unpack_blocks("whitening", packed, channels, symmetric=False)
        for level, (own, *_) in enumerate(whitening):
            if not (own.diagonal(dim1=1, dim2=2) > 0).all():
                raise ModelError(
                    f"the whitening of level {level} has a diagonal that is not positive"
                )
        return cls(means, whitening)


def factorise(
    moments: Moments, scale: float, offset: Blocks, *, dtype: torch.dtype = torch.float32
) -> Gaussian:
    """Factorise Σ = scale·S + offset at every cell, coarse to fine, in float64.

    Args:
        moments: of the cells.
        scale: the factor a on the scatter, see `Regularization`.
        offset: R as blocks (1, c_ℓ, c_k).
        dtype: of the result.

    Raises:
        ModelError: if there are fewer than two images, or a covariance is not positive definite; a
            predicate that follows the group's name.
    """
    if moments.count < 2:
        raise ModelError(
            f"has {moments.count} readable image{'s' * (moments.count != 1)}, "
            "and a fit needs at least 2"
        )
    coarsest = moments.means[-1]
    elements = sum(block.numel() for row in moments.scatters for block in row)
    # on CPUs a few cells at a time: their intermediate results stay in the cache
    runs = split_cells(len(coarsest), 1 if coarsest.is_cuda else -(-elements // MAX_RUN_ELEMENTS))
    return concatenate([_factorise(moments.cells(*run), scale, offset, dtype) for run in runs])


def _factorise(moments: Moments, scale: float, offset: Blocks, dtype: torch.dtype) -> Gaussian:
    levels = moments.levels
    cells = [len(mean) for mean in moments.means]
    whitening: list[list[torch.Tensor]] = [[] for _ in range(levels)]
    for level in reversed(range(levels)):
        own, *cross = (
            torch.add(constant, block, alpha=scale)
            for block, constant in zip(moments.scatters[level], offset[level], strict=True)
        )
        coarser = range(level + 1, levels)
        # X = Σ_{ℓ,>ℓ} W_{>ℓ}ᵀ; the ancestors' W is block triangular: row k has columns m ≥ k.
        factors = {
            k: _sum_products(
                [(cross[m - level - 1], whitening[k][m - k].mT) for m in range(k, levels)],
                cells[k],
            ).view(cells[level], own.shape[1], moments.means[k].shape[1])
            for k in coarser
        }
        for factor in factors.values():
            own = own.baddbmm_(factor, factor.mT, alpha=-1)
        inverse = _inverse_cholesky(own, level)
        whitening[level] = [inverse]
        for m in coarser:
            product = torch.zeros_like(cross[m - level - 1])
            for k in range(level + 1, m + 1):
                per_coarse_cell(product, cells[k]).baddbmm_(
                    per_coarse_cell(factors[k], cells[k]), whitening[k][m - k]
                )
            whitening[level].append(torch.bmm(inverse, product).neg_())
    return Gaussian(
        tuple(mean.to(dtype) for mean in moments.means),
        tuple(tuple(block.to(dtype).contiguous() for block in row) for row in whitening),
    )


def _sum_products(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], coarse_cells: int
) -> torch.Tensor:
    products = (torch.bmm(per_coarse_cell(a, coarse_cells), b) for a, b in pairs)
    return reduce(torch.Tensor.add_, products)


def _inverse_cholesky(covariance: torch.Tensor, level: int) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(covariance)
    if not torch.isfinite(covariance).all():
        raise ModelError(f"has NaN or infinite moments at level {level}")
    if info.any():
        raise ModelError(
            f"has a non-positive pivot in {int((info > 0).sum())} of {len(info)} covariances of "
            f"level {level}: its images hardly differ; add images, or regularise more "
            "(--ridge, --epsilon)"
        )
    identity = torch.eye(covariance.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def squared_distances(gaussian: Gaussian, patches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared Mahalanobis distances of patches, unitless (PaDiM, equation 2, squared).

    Args:
        gaussian: means and whitening of the same cells.
        patches: per level (P_ℓ, c_ℓ, B), in nested order.

    Returns:
        (P_0, B), in nested order; never negative, being sums of squares.
    """
    offsets = [x - mean[..., None] for x, mean in zip(patches, gaussian.means, strict=True)]
    total: torch.Tensor | None = None
    for level in reversed(range(len(offsets))):
        own, *cross = gaussian.whitening[level]
        whitened = torch.bmm(own, offsets[level])
        for block, coarse in zip(cross, offsets[level + 1 :], strict=True):
            per_coarse_cell(whitened, len(coarse)).baddbmm_(
                per_coarse_cell(block, len(coarse)), coarse
            )
        squares = whitened.square_().sum(1)
        if total is not None:
            squares.view(len(total), -1, squares.shape[-1]).add_(total[:, None])
        total = squares
    assert total is not None
    return total


def concatenate(parts: Sequence[Gaussian]) -> Gaussian:
    """Join the Gaussians of consecutive runs of cells."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].named
    return Gaussian.of_named(
        {name: torch.cat([part.named[name] for part in parts]) for name in names}
    )
