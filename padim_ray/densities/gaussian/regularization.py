"""Regularised covariances, and the pooled scatter they are shrunk towards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from padim_ray.densities.gaussian.moments import Blocks, Moments
from padim_ray.errors import ModelError
from padim_ray.storage.json_fields import number, read_fields, show, text

_REGULARIZATION = {
    "kind": text("shrink|paper"),
    "shrinkage": number,
    "ridge": number,
    "epsilon": number,
}


@dataclass(frozen=True)
class Regularization:
    """The covariance from the scatter: Σ = a·S + R, with the same R at all cells of a level.

    `paper`: a = 1/(n−1), R = ε·I (PaDiM, equation 1).
    `shrink`: a = (1−λ)/(n−1), R = λ·P/(n−1) + diag(r·t_ℓ), where P is the scatter averaged over all
    cells and t_ℓ the mean variance of level ℓ's channels.

    Attributes:
        kind: `shrink` or `paper`.
        shrinkage: λ, from 0 to below 1.
        ridge: r, relative to the channels' mean variance.
        epsilon: ε, in squared feature units.

    Raises:
        ModelError: if a value is out of its range.
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

    @classmethod
    def of_options(cls, options: Any) -> "Regularization":
        """The regularisation that `ModelOptions` ask for."""
        return cls(options.regularization, options.shrinkage, options.ridge, options.epsilon)

    @classmethod
    def only_field(cls, value: Mapping[str, Any], where: str) -> "Regularization":
        """Read the settings of a density that has a regularisation and nothing else.

        Args:
            value: a JSON object, as anybody may have written it.
            where: the object's place in the file, for errors.

        Raises:
            ModelError: if there are other settings, or a value is invalid.
        """
        if set(value) != {"regularization"}:
            raise ModelError(
                f"{where} must have a regularization and nothing else, not {show(sorted(value))}"
            )
        return read_fields(cls, value["regularization"], f"{where}.regularization", _REGULARIZATION)

    def describe(self) -> str:
        """The settings that apply to this kind, in words."""
        if self.kind == "shrink":
            return f"shrink (shrinkage {self.shrinkage:g}, ridge {self.ridge:g})"
        return f"paper (epsilon {self.epsilon:g})"

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
    """Scatters summed over cells. Every shard of cells needs them before it is factorised.

    Attributes:
        count: n, the number of images.
        cells: the number of cells of each level that were summed.
        sums: blocks (1, c_ℓ, c_k), float64.
    """

    count: int
    cells: tuple[int, ...]
    sums: Blocks

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for row in self.sums for block in row)

    def __add__(self, other: "PooledScatter") -> "PooledScatter":
        """Add the scatters of other cells of the same images."""
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
    """Sum every scatter block over its cells, in float64."""
    return PooledScatter(
        moments.count,
        tuple(len(mean) for mean in moments.means),
        tuple(
            tuple(block.sum(0, keepdim=True, dtype=torch.float64) for block in row)
            for row in moments.scatters
        ),
    )
