"""The interface of densities: from embeddings to distances.

A density is fitted from *statistics* of embeddings, which add up over images. That makes a fit
exact, distributed and mergeable for any number of images::

    empty → add_ → double → + …      statistics of all images of a group
    pool → +                         what all cells must share
    fit, shard by shard → join       the fitted density
    load → distances                 distances of new images

To add a density, write a module beside this one that implements `Density`, a `Statistics` (or use
another density's) and a `Fitted`, and add a line to `padim_ray.densities.DENSITIES`. What isn't
abstract here has a default that suits tensors with a row per cell and densities without settings.
`gaussian` and `shared` are examples; CONTRIBUTING.md has the smallest one that works.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import torch

from padim_ray.errors import ModelError
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.workers import ONE_BY_ONE, Workers
from padim_ray.storage.json_fields import show

Named = Mapping[str, torch.Tensor]


class State(ABC):
    """Named tensors of a run of coarsest cells and their descendants.

    Cells are in nested order, see `padim_ray.features.grid`. Tensors that vary over cells have
    cells as their first dimension. Names and shapes depend on the cells and settings only, never on
    values: they must be the same on the meta device, where they are compared with those of a file.
    """

    @property
    @abstractmethod
    def named(self) -> Named:
        """All tensors as they are in memory, not copied: writing to them changes the state."""

    @abstractmethod
    def like(self, named: Named) -> Self:
        """The same with other tensors of these names, in the same order."""

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors to save to a file: contiguous, finite, float32, float64 or int64.

        Redundant entries, such as one half of a symmetric matrix, may be left out. `Density` has
        the inverse: `unpack_statistics` or `unpack_fitted`.
        """
        return {name: tensor.contiguous() for name, tensor in self.named.items()}

    def cells(self, start: int, stop: int) -> Self:
        """The part for the coarsest cells [start, stop) and their descendants, as views."""
        coarsest = min(map(len, self.named.values()))
        return self.like(
            {
                name: tensor[start * len(tensor) // coarsest : stop * len(tensor) // coarsest]
                for name, tensor in self.named.items()
            }
        )

    def to(self, target: torch.device | str) -> Self:
        """Copy to a device; tensors that are already there are not copied."""
        return self.like({name: tensor.to(target) for name, tensor in self.named.items()})

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.named.values())


class Statistics(State):
    """Sufficient statistics of a set of images' embeddings; they add up over disjoint sets.

    `packed` must contain `count` as an int64 scalar: it is checked when a file is read.
    """

    count: int
    """The number of images."""

    @abstractmethod
    def add_(self, embeddings: Embeddings, workers: Workers = ONE_BY_ONE) -> Self:
        """Add a batch of images, in place in the tensors.

        Args:
            embeddings: of the same cells, on the same device.
            workers: threads to compute on.

        Returns:
            Statistics with the new count, which share this object's tensors. Don't use this object
            any more.
        """

    def double(self) -> Self:
        """Convert to the precision in which statistics are merged; idempotent."""
        return self.like({name: tensor.double() for name, tensor in self.named.items()})

    def packed(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(self.count)} | super().packed()

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """Statistics of the union of two disjoint sets of images.

        It must be associative and commutative up to rounding: partial sums are merged in any order.
        """

    @abstractmethod
    def __sub__(self, other: Self) -> Self:
        """Statistics of the images that aren't in `other`, a subset.

        Raises:
            ValueError: if `other` has more images.
        """


class Pooled(Protocol):
    """What fitting a run of cells needs to know about the group's other cells.

    The sum over disjoint runs is that of all their cells.
    """

    @property
    def count(self) -> int:
        """The number of images."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def __add__(self, other: Any) -> Self:
        """Pool both runs of cells, which must be of the same images."""
        ...


@dataclass(frozen=True)
class Counted:
    """Pooled statistics of densities whose cells share nothing but the number of images."""

    count: int
    nbytes: int = 0

    def __add__(self, other: "Counted") -> "Counted":
        if other.count != self.count:
            raise ValueError(f"{self.count} and {other.count} images are not the same")
        return self


class Fitted(State):
    """The fitted parameters of some cells; distances need nothing else."""


S = TypeVar("S", bound=Statistics)
F = TypeVar("F", bound=Fitted)
P = TypeVar("P", bound=Pooled)


class Density(ABC, Generic[S, F, P]):
    """A kind of density and its settings. Immutable; it holds nothing fitted."""

    kind: ClassVar[str]
    """Its name in `--density`, in model.json and at the beginning of its files' names."""

    statistics_kind: ClassVar[str]
    """The kind of its statistics, and the beginning of their files' names. Densities of the same
    `statistics_kind` can be converted into each other and merged."""

    per_cell: ClassVar[bool] = True
    """Whether every run of cells has parameters of its own. Otherwise all runs share the same, and
    only the first is fitted and saved."""

    searches: ClassVar[bool] = False
    """Whether it implements `search`."""

    @classmethod
    def of_options(cls, options: Any) -> Self:
        """The density that `ModelOptions` ask for."""
        return cls()

    @classmethod
    def of_json(cls, value: Mapping[str, Any], where: str) -> Self:
        """Read the settings: the inverse of `to_json`.

        Args:
            value: a JSON object without `kind`, as anybody may have written it: check every field.
            where: the object's place in the file, for errors.

        Raises:
            ModelError: if a field is missing, unknown or invalid.
        """
        if value:
            raise ModelError(f"{where} has no settings, but has {show(sorted(value))}")
        return cls()

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object, with `kind`."""
        return {"kind": self.kind}

    def describe(self) -> dict[str, str]:
        """The settings in words, by name, for people."""
        return {"density": self.kind}

    @abstractmethod
    def empty(self, grid: PatchGrid, device: torch.device | str = "cpu") -> S:
        """Statistics of no images, in the precision in which images are added."""

    @abstractmethod
    def statistics(self, count: int, named: Named) -> S:
        """Statistics of `count` images from the tensors of `State.named`, not copied."""

    def unpack_statistics(self, packed: Named) -> S:
        """Statistics from the tensors of `State.packed`.

        Names, shapes and types are checked already, and values are finite.
        """
        named = {name: tensor for name, tensor in packed.items() if name != "count"}
        return self.statistics(int(packed["count"]), named)

    def state_bytes(self, grid: PatchGrid) -> int:
        """Bytes of a group's statistics, which decide into how many shards they are cut.

        The number of shards is part of the model format: this must not change between versions.
        """
        return self.empty(grid, "meta").nbytes

    def pool(self, statistics: S) -> P:
        """Pool a run of cells: compute what all runs must share before they are fitted.

        Default: `Counted`.
        """
        return cast(P, Counted(statistics.count))

    @abstractmethod
    def fit(self, statistics: S, pooled: P) -> F:
        """Fit the density at a run of cells.

        Args:
            statistics: of the run.
            pooled: of all runs of the group.

        Raises:
            ModelError: if there are too few images, or they hardly differ. The message is a
                predicate, such as "has 1 readable image": the caller puts the group's name first.
        """

    @abstractmethod
    def empty_fitted(self, grid: PatchGrid, device: torch.device | str = "cpu") -> F:
        """A fitted density of all cells whose tensors are allocated but not initialised."""

    @abstractmethod
    def fitted(self, named: Named) -> F:
        """A fitted density from the tensors of `State.named`, not copied."""

    def unpack_fitted(self, packed: Named) -> F:
        """A fitted density from the tensors of `State.packed`.

        Names, shapes and types are checked already, and values are finite.

        Raises:
            ModelError: if the values can't come from a fit.
        """
        return self.fitted(packed)

    def join(self, parts: Sequence[F]) -> F:
        """Join the fitted densities of consecutive runs of cells."""
        names = parts[0].named
        return self.fitted(
            {name: torch.cat([part.named[name] for part in parts]) for name in names}
        )

    def load(self, fitted: F, device: torch.device, dtype: torch.dtype) -> F:
        """Prepare a fitted density for `distances`: move it to a device and optimise its layout.

        Args:
            fitted: of all cells.
            device: to compute distances on.
            dtype: of the embeddings whose distances will be computed.
        """
        return fitted.to(device)

    @abstractmethod
    def distances(
        self,
        fitted: F,
        embeddings: Embeddings,
        *,
        left_out_of: int | None = None,
        workers: Workers = ONE_BY_ONE,
    ) -> torch.Tensor:
        """Distances of embeddings from the density: the higher, the less likely.

        Args:
            fitted: of all cells, from `load`.
            embeddings: of all cells, on the same device.
            left_out_of: the number of images that the density was fitted to. If given, the
                embeddings must be of some of these images, and each image's distances are those
                from a density fitted without it.
            workers: threads to compute on.

        Returns:
            (P_0, B) float32 on the embeddings' device, not negative, in nested order.
        """

    def search(
        self,
        fitted: F,
        embeddings: Embeddings,
        images: torch.Tensor,
        cells: torch.Tensor,
        around: torch.Tensor,
        *,
        left_out_of: int | None = None,
        workers: Workers = ONE_BY_ONE,
    ) -> torch.Tensor:
        """Distances of some embeddings from the density at the nearest of several cells.

        Called only if `searches`: a model's specification refuses search otherwise.

        Args:
            fitted: of all cells, from `load`.
            embeddings: of all cells, on the same device.
            images: (N,) ascending, which image each of the embeddings to measure is of.
            cells: (N,), its cell on the finest grid, in nested order.
            around: (N, K), the cells whose parameters it is measured against; -1: none.
            left_out_of: see `distances`.
            workers: threads to compute on.

        Returns:
            (N,) float32 on the embeddings' device, not negative.
        """
        raise NotImplementedError(f"{self.kind} densities don't search")
