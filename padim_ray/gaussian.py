"""Per-patch Gaussians: regularised covariances factorised, and scored, coarse to fine.

With the coarsest channels first, the leading blocks of a patch's Cholesky factor depend on its
ancestors only, so they are shared by all their descendants like the scatters are. What is kept is
the inverse factor, the whitening W with WᵀW = Σ⁻¹, in the same nested blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from padim_ray.errors import ModelError
from padim_ray.moments import (
    Blocks,
    Moments,
    cut_cells,
    join_cells,
    pack_blocks,
    per_coarse_cell,
    read_levels,
    unpack_blocks,
)
from padim_ray.patches import split_cells

FACTORISED_TOGETHER = 2**20  # numbers of scatters: 8 MiB in float64


@dataclass(frozen=True)
class Regularization:
    """How a covariance is made from scatter: Σ = a·S + R, with the same R at all cells of a level.

    `paper`: a = 1/(n−1), R = ε·I (PaDiM, equation 1; ε = `epsilon`, in squared feature units).
    `shrink`: a = (1−λ)/(n−1), R = λ·P/(n−1) + diag(r·t_ℓ), with λ = `shrinkage`, r = `ridge`, P the
    scatter averaged over all cells and t_ℓ the mean variance of level ℓ's channels.
    """

    kind: Literal["shrink", "paper"] = "shrink"
    shrinkage: float = 0.1
    ridge: float = 0.01
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in ("shrink", "paper"):
            raise ModelError(f"regularization must be 'shrink' or 'paper', not {self.kind!r}")
        if not 0 <= self.shrinkage < 1:
            raise ModelError(f"shrinkage must be at least 0 and below 1, not {self.shrinkage}")
        if self.ridge < 0 or self.epsilon < 0:
            raise ModelError("ridge and epsilon must not be negative")

    def scale(self, count: int) -> float:
        """The factor a on the scatter of `count` images."""
        return (1 - self._weight) / (count - 1)

    def offset(self, pooled: "PooledScatter") -> Blocks:
        """R as blocks (1, c_ℓ, c_k), from the scatter pooled over *all* cells."""
        freedom = pooled.count - 1
        rows = []
        for level, row in enumerate(pooled.sums):
            blocks = [block * (self._weight / (freedom * pooled.cells[level])) for block in row]
            own = row[0].diagonal(dim1=1, dim2=2)
            if self.kind == "paper":
                ridge = torch.full_like(own, self.epsilon)
            else:
                variance = own.mean() / (freedom * pooled.cells[level])
                ridge = (self.ridge * variance).expand_as(own)
            rows.append((blocks[0] + torch.diag_embed(ridge), *blocks[1:]))
        return tuple(rows)

    @property
    def _weight(self) -> float:
        return self.shrinkage if self.kind == "shrink" else 0.0


@dataclass(frozen=True)
class PooledScatter:
    """Scatters summed over cells: what shards of cells must share before they are factorised."""

    count: int
    cells: tuple[int, ...]
    sums: Blocks

    def __add__(self, other: "PooledScatter") -> "PooledScatter":
        """Pool other cells of the same images as well."""
        if self.count != other.count:
            raise ValueError(f"scatters of {self.count} and of {other.count} images don't add up")
        return PooledScatter(
            self.count,
            tuple(a + b for a, b in zip(self.cells, other.cells, strict=True)),
            tuple(
                tuple(a + b for a, b in zip(*rows, strict=True))
                for rows in zip(self.sums, other.sums, strict=True)
            ),
        )


def pool(moments: Moments) -> PooledScatter:
    """Sum every scatter block over its cells, in float64: blocks (1, c_ℓ, c_k)."""
    return PooledScatter(
        moments.count,
        tuple(len(mean) for mean in moments.means),
        tuple(
            tuple(block.sum(0, keepdim=True, dtype=torch.float64) for block in row)
            for row in moments.scatters
        ),
    )


@dataclass(frozen=True)
class Gaussian:
    """Means (P_ℓ, c_ℓ) and whitening blocks (P_ℓ, c_ℓ, c_k), in nested order, finest first."""

    means: tuple[torch.Tensor, ...]
    whitening: Blocks

    def to(self, device: torch.device | str) -> "Gaussian":
        return Gaussian(
            tuple(mean.to(device) for mean in self.means),
            tuple(tuple(block.to(device) for block in row) for row in self.whitening),
        )

    def cells(self, start: int, stop: int) -> "Gaussian":
        """The Gaussians of the coarsest cells [start, stop) and all their descendants, as views."""
        coarsest = len(self.means[-1])
        return Gaussian(
            tuple(cut_cells(self.means, coarsest, start, stop)),
            tuple(tuple(cut_cells(row, coarsest, start, stop)) for row in self.whitening),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.means, *(block for row in self.whitening for block in row)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def factorise(
    moments: Moments, scale: float, offset: Blocks, *, dtype: torch.dtype = torch.float32
) -> Gaussian:
    """Whiten Σ = scale·S + offset at every cell, coarse to fine, computing in float64.

    Scale and offset are arguments, not derived here, because leave-one-out distances need the same
    offset with another scale.

    Raises:
        ModelError: at fewer than two images, or a covariance that is not positive definite.
    """
    if moments.count < 2:
        raise ModelError(
            f"has {moments.count} readable image{'s' * (moments.count != 1)}, "
            "and a covariance needs at least 2"
        )
    coarsest = moments.means[-1]
    numbers = sum(block.numel() for row in moments.scatters for block in row)
    # on CPUs a few cells at a time, whose intermediate results stay in the cache
    runs = split_cells(len(coarsest), 1 if coarsest.is_cuda else -(-numbers // FACTORISED_TOGETHER))
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
    """Squared Mahalanobis distance of every patch, unitless (PaDiM, equation 2, squared).

    Args:
        gaussian: means and whitening of the same cells.
        patches: per level (P_ℓ, c_ℓ, B), in nested order.

    Returns:
        (P_0, B), in nested order. A sum of squares: never negative.
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


def to_tensors(gaussian: Gaussian) -> dict[str, torch.Tensor]:
    """Named tensors to save; triangular corners keep their lower triangle only."""
    return {
        **{f"mean.{level}": mean for level, mean in enumerate(gaussian.means)},
        **pack_blocks("whitening", gaussian.whitening),
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Gaussian:
    """The inverse of `to_tensors`.

    Raises:
        ModelError: if a whitening has a diagonal that is not positive.
    """
    means = read_levels("mean", tensors)
    channels = [mean.shape[1] for mean in means]
    whitening = unpack_blocks("whitening", tensors, channels, symmetric=False)
    for level, (own, *_) in enumerate(whitening):
        if not (own.diagonal(dim1=1, dim2=2) > 0).all():
            raise ModelError(f"the whitening of level {level} has a diagonal that is not positive")
    return Gaussian(means, whitening)


def concatenate(parts: Sequence[Gaussian]) -> Gaussian:
    """Join the Gaussians of consecutive runs of cells."""
    if len(parts) == 1:
        return parts[0]
    return Gaussian(*join_cells([(part.means, part.whitening) for part in parts]))
