"""One Gaussian for all cells, for textures and objects that aren't aligned.

It is fitted from the same moments as a Gaussian per cell. An image contributes one embedding at
each of the P finest cells, so n images give N = n·P embeddings. Their scatter is the sum of the
cells' scatters and of the differences between the cells' means (Chan, Golub and LeVeque 1983):

    S[ℓ, k] = Σ_p S_p[ℓ, k] + n·Σ_p (μ_p − μ)_ℓ (μ_p − μ)_kᵀ,   μ the mean of the cells' means,

Nearest-neighbour alignment repeats a coarse cell over its descendants, so every sum over the finest
cells is a sum over level ℓ's own cells, times the number of descendants. The covariance is
S / (N − 1) + R, with R = diag(r·t_ℓ) for `shrink`, where t_ℓ is the mean variance of level ℓ's
channels, and R = ε·I for `paper`. `shrink` has nothing else to shrink towards.

Leave-one-out is exact: the image's own P embeddings are subtracted from mean and scatter, and the
covariance is factorised again. That takes about as long as computing the image's distances.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch

from padim_ray.densities.base import Density, Fitted, Named
from padim_ray.densities.gaussian import GaussianDensity, Moments, Regularization
from padim_ray.errors import ModelError
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.workers import ONE_BY_ONE, Workers

LEFT_OUT_BATCH = 8  # images whose covariances are factorised in one batch


@dataclass(frozen=True)
class PooledMoments:
    """Moments of all embeddings of some cells, in float64; they add up over runs of cells.

    Attributes:
        count: n, the number of images.
        embeddings: N, the number of embeddings: one per image and finest cell.
        channels: c_ℓ of each level, finest first.
        mean: (D,), over the channels of all levels, finest first.
        scatter: (D, D), centred, not divided by N − 1.
    """

    count: int
    embeddings: int
    channels: tuple[int, ...]
    mean: torch.Tensor
    scatter: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.scatter.nbytes

    def __add__(self, other: "PooledMoments") -> "PooledMoments":
        """Moments of both runs of cells, of the same images."""
        if self.count != other.count:
            raise ValueError(f"moments of {self.count} and of {other.count} images don't add up")
        total = self.embeddings + other.embeddings
        delta = other.mean - self.mean
        return PooledMoments(
            self.count,
            total,
            self.channels,
            self.mean + delta * (other.embeddings / total),
            self.scatter
            + other.scatter
            + torch.outer(delta, delta) * (self.embeddings * other.embeddings / total),
        )


@dataclass(frozen=True)
class SharedGaussian(Fitted):
    """The moments of all embeddings, and the inverse Cholesky factor of their covariance.

    Attributes:
        embeddings: N, (1,) int64.
        mean: (D,) float64, finest level's channels first.
        scatter: (D, D) float64.
        whitening: W with WᵀW = Σ⁻¹, (D, D) float32, upper triangular: the rows of level ℓ have
            columns of the levels k ≥ ℓ only.
        channels: c_ℓ of each level, int64.
    """

    embeddings: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor
    whitening: torch.Tensor
    channels: torch.Tensor

    @property
    def named(self) -> dict[str, torch.Tensor]:
        return {
            "embeddings": self.embeddings,
            "mean": self.mean,
            "scatter": self.scatter,
            "whitening": self.whitening,
            "channels": self.channels,
        }

    def like(self, named: Named) -> "SharedGaussian":
        return SharedGaussian(**named)

    def cells(self, start: int, stop: int) -> "SharedGaussian":
        return self  # all cells share it

    @cached_property
    def levels(self) -> list[slice]:
        """The channels of each level in an embedding."""
        return _levels(self.channels.tolist())


@dataclass(frozen=True)
class SharedDensity(Density[Moments, SharedGaussian, PooledMoments]):
    """One Gaussian for all cells; distances are Mahalanobis distances."""

    kind: ClassVar[str] = "shared"
    statistics_kind: ClassVar[str] = GaussianDensity.statistics_kind
    per_cell: ClassVar[bool] = False
    regularization: Regularization

    @classmethod
    def of_options(cls, options: Any) -> "SharedDensity":
        return cls(Regularization.of_options(options))

    @classmethod
    def of_json(cls, value: Mapping[str, Any], where: str) -> "SharedDensity":
        return cls(Regularization.only_field(value, where))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "regularization": asdict(self.regularization)}

    def describe(self) -> dict[str, str]:
        return {"density": self.kind, "regularization": self.regularization.describe()}

    @property
    def _per_cell(self) -> GaussianDensity:
        """The density per cell that has the same statistics."""
        return GaussianDensity(self.regularization)

    def empty(self, grid: PatchGrid, device: torch.device | str = "cpu") -> Moments:
        return self._per_cell.empty(grid, device)

    def statistics(self, count: int, named: Named) -> Moments:
        return self._per_cell.statistics(count, named)

    def unpack_statistics(self, packed: Named) -> Moments:
        return self._per_cell.unpack_statistics(packed)

    def state_bytes(self, grid: PatchGrid) -> int:
        return self._per_cell.state_bytes(grid)

    def pool(self, statistics: Moments) -> PooledMoments:
        means = [mean.double() for mean in statistics.means]
        finest = len(means[0])
        channels = tuple(mean.shape[1] for mean in means)
        where = _levels(channels)
        # the cells' means are one image's embeddings
        (mean,), (scatter,) = _moments_of_each([level[None] for level in means], where)
        scatter *= statistics.count
        for level, row in enumerate(statistics.scatters):
            descendants = finest / len(means[level])
            for k, block in enumerate(row, start=level):
                within = block.sum(0, dtype=torch.float64) * descendants
                scatter[where[level], where[k]] += within
                if k > level:
                    scatter[where[k], where[level]] += within.mT
        return PooledMoments(statistics.count, statistics.count * finest, channels, mean, scatter)

    def fit(self, statistics: Moments, pooled: PooledMoments) -> SharedGaussian:
        if pooled.count < 2:
            raise ModelError(f"has {pooled.count} readable image, and a fit needs at least 2")
        covariance = self._covariance(pooled.scatter, pooled.embeddings, pooled.channels)
        if not covariance.isfinite().all():
            raise ModelError("has NaN or infinite moments")
        whitening = _whiten(covariance)
        if not whitening.isfinite().all():
            raise ModelError(
                "has a covariance with a non-positive pivot: its images hardly differ; add images, "
                "or regularise more (--ridge, --epsilon)"
            )
        return SharedGaussian(
            torch.tensor([pooled.embeddings]),
            pooled.mean,
            pooled.scatter,
            whitening.float().contiguous(),
            torch.tensor(pooled.channels),
        )

    def _covariance(
        self, scatter: torch.Tensor, embeddings: float, channels: Sequence[int]
    ) -> torch.Tensor:
        """The regularised covariance (…, D, D) from a scatter (…, D, D)."""
        covariance = scatter / (embeddings - 1)
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        if self.regularization.kind == "paper":
            diagonal += self.regularization.epsilon
        else:
            ridges = [
                diagonal[..., level].mean(-1, keepdim=True).expand_as(diagonal[..., level])
                for level in _levels(channels)
            ]
            diagonal += self.regularization.ridge * torch.cat(ridges, -1)
        return covariance

    def empty_fitted(self, grid: PatchGrid, device: torch.device | str = "cpu") -> SharedGaussian:
        width = sum(grid.channels)
        return SharedGaussian(
            torch.empty(1, dtype=torch.int64, device=device),
            torch.empty(width, dtype=torch.float64, device=device),
            torch.empty(width, width, dtype=torch.float64, device=device),
            torch.empty(width, width, device=device),
            torch.empty(grid.levels, dtype=torch.int64, device=device),
        )

    def fitted(self, named: Named) -> SharedGaussian:
        return SharedGaussian(**named)

    def unpack_fitted(self, packed: Named) -> SharedGaussian:
        fitted = self.fitted(packed)
        if (
            not 0 < fitted.embeddings.item() < 2**53
            or not (fitted.channels >= 0).all()
            or fitted.channels.sum() != len(fitted.mean)
        ):
            raise ModelError("it is not the Gaussian of any embeddings")
        if not (fitted.whitening.diagonal() > 0).all():
            raise ModelError("its whitening has a diagonal that is not positive")
        return fitted

    def join(self, parts: Sequence[SharedGaussian]) -> SharedGaussian:
        return parts[0]

    @torch.inference_mode()
    def distances(
        self,
        fitted: SharedGaussian,
        embeddings: Embeddings,
        *,
        left_out_of: int | None = None,
        workers: Workers = ONE_BY_ONE,
    ) -> torch.Tensor:
        if left_out_of is None:
            parts = embeddings.split(max(1, -(-len(embeddings) // workers.threads)))
            pieces = workers.map(lambda part: _measure(fitted, part), parts)
        else:
            parts = embeddings.split(LEFT_OUT_BATCH)
            pieces = workers.map(lambda part: self._leave_one_out(fitted, part, left_out_of), parts)
        return torch.cat(pieces, 1).sqrt_()

    def _leave_one_out(
        self, fitted: SharedGaussian, embeddings: Embeddings, images: int
    ) -> torch.Tensor:
        """Squared distances (P_0, B), each image's from the Gaussian of the other images."""
        total = int(fitted.embeddings)
        own = total // images  # embeddings per image
        levels = [
            level[..., :channels].double()
            for level, channels in zip(embeddings.levels, embeddings.channels, strict=True)
        ]
        mean, scatter = _moments_of_each(levels, fitted.levels)
        left = total - own
        delta = mean - fitted.mean  # (B, D)
        # Chan's formula, solved for the other images
        others = fitted.mean - delta * (own / left)
        scatter = fitted.scatter - scatter - _outer(delta) * (total * own / left)
        covariance = self._covariance(scatter, left, fitted.channels.tolist())
        whitening = _whiten(covariance).float()
        if not whitening.isfinite().all():
            raise ModelError(
                "Without one of its images, a group has no covariance: add images, or regularise "
                "more (--ridge, --epsilon)"
            )
        squares = [
            _measure(
                replace(fitted, mean=others[row], whitening=whitening[row]),
                embeddings[slice(row, row + 1)],
            )
            for row in range(len(embeddings))
        ]
        return torch.cat(squares, 1)


def _levels(channels: Sequence[int]) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise(accumulate(channels, initial=0))]


def _families(fine: torch.Tensor, coarse: torch.Tensor, dimension: int) -> tuple[int, int]:
    """The number of coarse cells, and of each one's descendants among the fine cells."""
    ancestors = coarse.shape[dimension]
    return ancestors, fine.shape[dimension] // ancestors


def _outer(vectors: torch.Tensor) -> torch.Tensor:
    return vectors[..., :, None] * vectors[..., None, :]


def _whiten(covariance: torch.Tensor) -> torch.Tensor:
    """W (…, D, D) with WᵀW = Σ⁻¹, upper triangular; NaN where Σ is not positive definite.

    The matrix is reversed before it is factorised, so that the coarsest channels come first.
    """
    factor, info = torch.linalg.cholesky_ex(covariance.flip(-1, -2))
    identity = torch.eye(covariance.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return torch.where((info > 0)[..., None, None], torch.nan, inverse.flip(-1, -2))


def _measure(fitted: SharedGaussian, embeddings: Embeddings) -> torch.Tensor:
    """Squared Mahalanobis distances (P_0, B) float32, coarse to fine, each product once."""
    offsets = [
        level[..., :channels].float() - fitted.mean[where].float()
        for level, channels, where in zip(
            embeddings.levels, embeddings.channels, fitted.levels, strict=True
        )
    ]  # (B, P_ℓ, c_ℓ)
    total: torch.Tensor | None = None
    for level in reversed(range(len(offsets))):
        rows = fitted.whitening[fitted.levels[level]]
        whitened = offsets[level] @ rows[:, fitted.levels[level]].mT
        for coarse, where in zip(offsets[level + 1 :], fitted.levels[level + 1 :], strict=True):
            per_ancestor = whitened.unflatten(1, _families(whitened, coarse, 1))
            per_ancestor += (coarse @ rows[:, where].mT)[:, :, None]
        squares = whitened.square_().sum(-1)
        if total is not None:
            squares.unflatten(1, _families(squares, total, 1)).add_(total[..., None])
        total = squares
    assert total is not None
    return total.T


def _moments_of_each(
    levels: Sequence[torch.Tensor], where: Sequence[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, D) and centred scatter (B, D, D) of each image's own embeddings.

    Args:
        levels: the features (B, P_ℓ, c_ℓ) of each level, finest first, float64.
        where: the channels of each level in an embedding.
    """
    mean = torch.cat([level.mean(1) for level in levels], -1)
    scatter = mean.new_zeros(len(mean), mean.shape[1], mean.shape[1])
    finest = levels[0].shape[1]
    offsets = [
        level - mean[:, None, channels] for level, channels in zip(levels, where, strict=True)
    ]
    for level, fine in enumerate(offsets):
        for k, coarse in enumerate(offsets[level:], start=level):
            below = fine.unflatten(1, _families(fine, coarse, 1)).sum(2)
            block = below.mT @ coarse * (finest / fine.shape[1])
            scatter[:, where[level], where[k]] = block
            scatter[:, where[k], where[level]] = block.mT
    return mean, scatter


DENSITY = SharedDensity
