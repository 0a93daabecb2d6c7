"""PaDiM's density: a Gaussian for every cell."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from padim_ray.densities.base import Density, Named
from padim_ray.densities.gaussian.leave_one_out import (
    NEGLIGIBLE_FROM,
    leave_one_out_squared_distances,
)
from padim_ray.densities.gaussian.moments import Moments, empty_moments, scatter_elements
from padim_ray.densities.gaussian.regularization import PooledScatter, Regularization, pool
from padim_ray.densities.gaussian.search import squared_distances_to_nearest
from padim_ray.densities.gaussian.whitening import (
    Gaussian,
    concatenate,
    factorise,
    squared_distances,
)
from padim_ray.features import gpu
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.workers import ONE_BY_ONE, Workers

LEFT_OUT_BATCH = 8  # images; 16 would be 10 % faster and take twice the memory


@dataclass(frozen=True)
class GaussianDensity(Density[Moments, Gaussian, PooledScatter]):
    """A Gaussian per cell, fitted from moments; distances are Mahalanobis distances."""

    kind: ClassVar[str] = "gaussian"
    statistics_kind: ClassVar[str] = "moments"
    searches: ClassVar[bool] = True
    regularization: Regularization

    @classmethod
    def of_options(cls, options: Any) -> "GaussianDensity":
        return cls(Regularization.of_options(options))

    @classmethod
    def of_json(cls, value: Mapping[str, Any], where: str) -> "GaussianDensity":
        return cls(Regularization.only_field(value, where))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "regularization": asdict(self.regularization)}

    def describe(self) -> dict[str, str]:
        return {"density": self.kind, "regularization": self.regularization.describe()}

    def empty(self, grid: PatchGrid, device: torch.device | str = "cpu") -> Moments:
        return empty_moments(grid.cells, grid.channels, device=device)

    def statistics(self, count: int, named: Named) -> Moments:
        return Moments.of_named(count, named)

    def unpack_statistics(self, packed: Named) -> Moments:
        return Moments.of_packed(packed)

    def state_bytes(self, grid: PatchGrid) -> int:
        return 4 * scatter_elements(grid)

    def pool(self, statistics: Moments) -> PooledScatter:
        return pool(statistics)

    def fit(self, statistics: Moments, pooled: PooledScatter) -> Gaussian:
        rule = self.regularization
        return factorise(statistics, rule.scale(statistics.count), rule.offset(pooled))

    def empty_fitted(self, grid: PatchGrid, device: torch.device | str = "cpu") -> Gaussian:
        like = self.empty(grid, device)
        return Gaussian(tuple(mean.float() for mean in like.means), like.scatters)

    def fitted(self, named: Named) -> Gaussian:
        return Gaussian.of_named(named)

    def unpack_fitted(self, packed: Named) -> Gaussian:
        return Gaussian.of_packed(packed)

    def join(self, parts: Sequence[Gaussian]) -> Gaussian:
        return concatenate(parts)

    def load(self, fitted: Gaussian, device: torch.device, dtype: torch.dtype) -> Gaussian:
        fitted = fitted.to(device)
        if dtype == torch.bfloat16 and gpu.has_kernels(device):
            from padim_ray.densities.gaussian import kernels

            return kernels.align_rows(fitted)
        return fitted

    @torch.inference_mode()
    def distances(
        self,
        fitted: Gaussian,
        embeddings: Embeddings,
        *,
        left_out_of: int | None = None,
        workers: Workers = ONE_BY_ONE,
    ) -> torch.Tensor:
        if left_out_of is None and embeddings.are_bfloat16_on(gpu.has_kernels):
            from padim_ray.densities.gaussian import kernels

            return kernels.squared_distances(fitted, embeddings).sqrt_()

        def squared(cells: Gaussian, patches: Sequence[torch.Tensor]) -> torch.Tensor:
            if left_out_of is None:
                return squared_distances(cells, patches)
            return leave_one_out_squared_distances(cells, patches, left_out_of, self.regularization)

        if left_out_of is not None and left_out_of < NEGLIGIBLE_FROM:
            # an image's share in the regularisation needs all of its cells: no runs of cells here
            parts = embeddings.split(LEFT_OUT_BATCH)
            pieces = workers.map(lambda part: squared(fitted, part.patches()), parts)
            return torch.cat(pieces, 1).sqrt_()
        pieces = workers.map(
            lambda run: squared(fitted.cells(*run), embeddings.patches(*run)), embeddings.runs()
        )
        return torch.cat(pieces).sqrt_()

    @torch.inference_mode()
    def search(
        self,
        fitted: Gaussian,
        embeddings: Embeddings,
        images: torch.Tensor,
        cells: torch.Tensor,
        around: torch.Tensor,
        *,
        left_out_of: int | None = None,
        workers: Workers = ONE_BY_ONE,
    ) -> torch.Tensor:
        def squared(rows: slice) -> torch.Tensor:
            return squared_distances_to_nearest(
                *(fitted, embeddings, images[rows], cells[rows], around[rows]),
                *(left_out_of, self.regularization),
            )

        counts = images.unique_consecutive(return_counts=True)[1]
        # a thread's share; or, with a matrix for each image that is left out, a few images
        few = LEFT_OUT_BATCH if left_out_of else -(-len(counts) // workers.threads) or 1
        stops = [0, *counts.cumsum(0)[few - 1 :: few].tolist(), len(images)]
        parts = [slice(*bounds) for bounds in pairwise(stops) if bounds[0] < bounds[1]]
        pieces = workers.map(squared, parts)
        return torch.cat([*pieces, images.new_empty(0, dtype=torch.float32)]).sqrt_()
