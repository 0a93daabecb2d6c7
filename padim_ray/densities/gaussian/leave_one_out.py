"""Exact leave-one-out distances of training images, computed from the Gaussians of all images.

Let d = x − μ be a training image's offset at a patch, c = n/(n−1), and S the scatter. Without the
image the scatter is S − c·ddᵀ, and the image lies c·d away from the mean. The image's share in R is
known too: the scatter averaged over cells loses A = c·Σ_p d_p d_pᵀ / P. Let B = Σ·(n−1)/(n−2), for
which Σ's factorisation serves. The covariance without the image is

    Σ₋ᵢ = (B − E) − a′c·ddᵀ,   a′ = (1−λ)/(n−2),
    E = (λA + diag(r·t_ℓ(A)))/(n−2) for `shrink`,   E = ε·I/(n−2) for `paper`,

and by Sherman and Morrison's formula the squared distance without the image is
M² = c²q/(1 − a′c·q), q = dᵀ(B − E)⁻¹d. E is a small correction to B, so a few steps of conjugate
gradients, preconditioned by B⁻¹ = WᵀW·(n−2)/(n−1), give q. They go on until M² has converged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise

import torch

from padim_ray.densities import MIN_LEFT_OUT_OF
from padim_ray.densities.gaussian.moments import cut_cells
from padim_ray.densities.gaussian.regularization import Regularization
from padim_ray.densities.gaussian.whitening import Gaussian, squared_distances
from padim_ray.features.grid import split_cells

MIN_DENOMINATOR = 1e-6  # floor for 1 − a′c·q
MAX_CORRECTION_ELEMENTS = 2**24  # of E, for the images of one batch
MAX_FIELD_ELEMENTS = 2**20  # of a batch's vectors, in one run of cells
NEGLIGIBLE_FROM = 500  # images: one image's share in R then moves scores by less than 1 %
TOLERANCE = {"shrink": 2e-3, "paper": 3e-5}  # relative, of distances; steps for `paper` are cheap
MAX_STEPS = 10


def leave_one_out_squared_distances(
    gaussian: Gaussian,
    patches: Sequence[torch.Tensor],
    count: int,
    regularization: Regularization,
    *,
    tolerance: float | None = None,
    max_steps: int | None = None,
) -> torch.Tensor:
    """Squared Mahalanobis distances of each image to the Gaussians fitted without it.

    Args:
        gaussian: fitted to all images.
        patches: embeddings of some of these images, per level (P_ℓ, c_ℓ, B), in nested order.
        count: n, the number of images that the Gaussians were fitted to; at least 3.
        regularization: the one that the Gaussians were fitted with.
        tolerance: relative error of the distances at which the iteration ends. Default: 2e-3, and
            3e-5 for `paper`.
        max_steps: maximum number of conjugate gradient steps; 0 neglects E. Default: 10, and 0 from
            500 images on, where a step costs more than its correction is worth.

    Returns:
        (P_0, B), in nested order.

    Raises:
        ValueError: if `count` is below 3.
    """
    if count < MIN_LEFT_OUT_OF:
        raise ValueError(f"leaving one of {count} images out leaves no covariance")
    steps, relative = steps_and_tolerance(count, regularization)
    max_steps = steps if max_steps is None else max_steps
    tolerance = relative if tolerance is None else tolerance
    remove = Removal(count, regularization.scale(count - 1))
    if not max_steps:
        return remove.squared_distances(squared_distances(gaussian, patches) * remove.unscaled)
    channels = sum(mean.shape[1] for mean in gaussian.means)
    batch = max(1, MAX_CORRECTION_ELEMENTS // channels**2)
    solved = []
    for part in zip(*(level.split(batch, -1) for level in patches), strict=True):
        offsets = [
            (x - mean[..., None]).mT for x, mean in zip(part, gaussian.means, strict=True)
        ]  # (P_ℓ, B, c_ℓ)
        correction = correction_of(offsets, count, regularization)
        coarsest, elements = len(offsets[-1]), offsets[0][..., 0].numel() * channels
        solved.append(
            torch.cat(
                [
                    _solve(
                        gaussian.cells(start, stop),
                        cut_cells(offsets, coarsest, start, stop),
                        correction,
                        remove,
                        tolerance,
                        max_steps,
                    )
                    for start, stop in split_cells(coarsest, -(-elements // MAX_FIELD_ELEMENTS))
                ]
            )
        )
    return torch.cat(solved, -1)


def steps_and_tolerance(count: int, regularization: Regularization) -> tuple[int, float]:
    """Steps of conjugate gradients, at most, and relative error at which they end."""
    return MAX_STEPS if count < NEGLIGIBLE_FROM else 0, TOLERANCE[regularization.kind]


@dataclass(frozen=True)
class Removal:
    """The removal of one image.

    Attributes:
        count: n, the number of images with the removed one.
        scale: a′, the factor on the scatter of n − 1 images.
    """

    count: int
    scale: float

    @property
    def share(self) -> float:
        """c = n/(n−1)."""
        return self.count / (self.count - 1)

    @property
    def unscaled(self) -> float:
        """The factor from Σ⁻¹ to B⁻¹."""
        return (self.count - 2) / (self.count - 1)

    def squared_distances(self, q: torch.Tensor) -> torch.Tensor:
        """M² from q."""
        # exactly, it is positive; in float32 a nearly singular covariance may round it to 0
        denominator = (1 - self.scale * self.share * q).clamp_(min=MIN_DENOMINATOR)
        return q * self.share**2 / denominator


def _solve(
    gaussian: Gaussian,
    offsets: Sequence[torch.Tensor],
    correction: torch.Tensor | float,
    remove: Removal,
    tolerance: float,
    max_steps: int,
) -> torch.Tensor:
    """M² at some patches, (P_0, B), by conjugate gradients.

    Fields are (P_0, B, D): one vector of all channels for every patch and image.
    """
    residual = _repeat_down(offsets)
    direction = _solve_covariance_nested(gaussian, offsets).mul_(remove.unscaled)
    from_b = residual.clone()  # B · direction; a recursion gives it without multiplying by B
    product = (residual * direction).sum(-1)
    tiny = torch.finfo(product.dtype).tiny  # products are 0 where an image equals the mean
    solved = torch.zeros_like(product)
    squared = remove.squared_distances(product)
    change: float | None = None
    for step in range(max_steps):
        image = from_b - _apply(correction, direction)
        length = product / (direction * image).sum(-1).clamp_(min=tiny)
        solved += length * product
        before, squared = squared, remove.squared_distances(solved)
        last, change = change, float((squared / before.clamp(min=tiny)).max().sqrt()) - 1
        if next_change(change, last) <= tolerance or step == max_steps - 1:
            break
        residual -= length[..., None] * image
        conditioned = _solve_covariance(gaussian, residual).mul_(remove.unscaled)
        previous, product = product, (residual * conditioned).sum(-1)
        ratio = (product / previous.clamp_(min=tiny))[..., None]
        direction = conditioned.addcmul_(ratio, direction)
        from_b = from_b.mul_(ratio).add_(residual)
    return squared


def next_change(change: float, last: float | None) -> float:
    """The expected change of the next step, given that of this one and of the last."""
    # it shrinks by about the same factor at every step; the first change is about that factor
    return change * (change / last if last else 2.5 * change)


def correction_of(
    offsets: Sequence[torch.Tensor], count: int, regularization: Regularization
) -> torch.Tensor | float:
    """E of every image, (B, D, D); for `paper` the factor on I."""
    if regularization.kind == "paper":
        return regularization.epsilon / (count - 2)
    starts = _starts(offsets)
    pooled = offsets[0].new_empty(offsets[0].shape[1], starts[-1], starts[-1])
    for k, coarse in enumerate(offsets):
        columns = slice(starts[k], starts[k + 1])
        for level, fine in enumerate(offsets[: k + 1]):
            # a coarse vector is the same for all descendants: multiply it by their sum
            descendants = fine.view(len(coarse), -1, *fine.shape[1:]).sum(1)
            block = torch.bmm(descendants.permute(1, 2, 0), coarse.transpose(0, 1))
            block *= count / (count - 1) / len(fine)
            rows = slice(starts[level], starts[level + 1])
            pooled[:, rows, columns], pooled[:, columns, rows] = block, block.mT
    ridges = [
        pooled.diagonal(dim1=1, dim2=2)[:, start:stop]
        .mean(1, keepdim=True)
        .expand(-1, stop - start)
        for start, stop in pairwise(starts)
        if stop > start
    ]
    correction = regularization.shrinkage * pooled
    correction.diagonal(dim1=1, dim2=2).add_(regularization.ridge * torch.cat(ridges, 1))
    return correction.div_(count - 2)


def _apply(correction: torch.Tensor | float, field: torch.Tensor) -> torch.Tensor:
    if isinstance(correction, float):
        return correction * field
    return torch.bmm(field.transpose(0, 1), correction).transpose(0, 1)  # symmetric


def _repeat_down(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make a field of levels (P_ℓ, B, c_ℓ) by repeating coarse vectors at all their patches."""
    starts = _starts(levels)
    field = levels[0].new_empty(*levels[0].shape[:2], starts[-1])
    for level, (start, stop) in zip(levels, pairwise(starts), strict=True):
        field.view(len(level), -1, *field.shape[1:])[..., start:stop] = level[:, None]
    return field


def _solve_covariance_nested(gaussian: Gaussian, offsets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply Σ⁻¹ to levels (P_ℓ, B, c_ℓ), each product on the grid on which it varies: a field."""
    starts = _starts(offsets)
    result = offsets[0].new_zeros(*offsets[0].shape[:2], starts[-1])
    for level, row in enumerate(gaussian.whitening):
        cells, images = offsets[level].shape[:2]
        above = [
            coarse[:, None].expand(-1, cells // len(coarse), -1, -1).reshape(cells, images, -1)
            for coarse in offsets[level:]
        ]
        whitened = reduce(
            torch.add,
            (torch.bmm(vectors, block.mT) for vectors, block in zip(above, row, strict=True)),
        )
        target = result.view(cells, -1, images, starts[-1])
        for (start, stop), block in zip(pairwise(starts[level:]), row, strict=True):
            target[..., start:stop] += torch.bmm(whitened, block)[:, None]
    return result


def _solve_covariance(gaussian: Gaussian, field: torch.Tensor) -> torch.Tensor:
    """Apply Σ⁻¹ = WᵀW to a field, block by block."""
    starts = _starts([mean[:, None] for mean in gaussian.means])
    result = torch.zeros_like(field)
    for level, row in enumerate(gaussian.whitening):
        cells = (len(row[0]), -1, field.shape[-1])  # the vectors below each cell of the level
        source, target = field.view(cells), result.view(cells)
        columns = [slice(*bounds) for bounds in pairwise(starts[level:])]
        whitened = reduce(
            torch.add,
            (
                torch.bmm(source[..., where], block.mT)
                for where, block in zip(columns, row, strict=True)
            ),
        )
        for where, block in zip(columns, row, strict=True):
            target[..., where].baddbmm_(whitened, block)
    return result


def _starts(levels: Sequence[torch.Tensor]) -> list[int]:
    """The first channel of each level in a field's vectors, and the number of all channels."""
    return list(accumulate((level.shape[-1] for level in levels), initial=0))
