"""What a density is: the one seam between features and everything that uses distances.

A density is fitted from *statistics* of embeddings, which add up over images: so a fit is
distributed, exact at any number of images, and can be merged. A new density is a file beside this
one and a line in `padim_ray.densities.DENSITIES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch

from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.workers import ONE_BY_ONE, Workers

Named = Mapping[str, torch.Tensor]


class State(ABC):
    """Numbers of a run of coarsest cells and their descendants: tensors with names.

    Cells are in nested order, see `padim_ray.features.grid`. Tensors that vary over cells have them
    as their first dimension.
    """

    @property
    @abstractmethod
    def named(self) -> Named:
        """The tensors as they are in memory, without copies."""

    @abstractmethod
    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors as they are saved, each number once."""

    @abstractmethod
    def cells(self, start: int, stop: int) -> Self:
        """The part for the coarsest cells [start, stop) and their descendants, as views."""

    @abstractmethod
    def to(self, target: torch.device | str) -> Self:
        """A copy on a device; itself if it is there."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.named.values())


class Statistics(State):
    """What is known of a set of images' embeddings; adds up over disjoint sets."""

    count: int
    """The number of images."""

    @abstractmethod
    def add_(self, embeddings: Embeddings, workers: Workers = ONE_BY_ONE) -> Self:
        """Add a batch of images, in place in the tensors; the result has them, and the new count.

        Args:
            embeddings: on the statistics' device, of the same cells.
            workers: threads that work on runs of cells side by side.
        """

    @abstractmethod
    def double(self) -> Self:
        """The same in the precision in which statistics are merged."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """Statistics of both sets of images together."""

    @abstractmethod
    def __sub__(self, other: Self) -> Self:
        """Statistics of the images that aren't in `other`, a subset.

        Raises:
            ValueError: if `other` has more images.
        """


class Pooled(Protocol):
    """What the runs of cells of one set of images must share before each is fitted; adds up."""

    @property
    def count(self) -> int:
        """The number of images."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def __add__(self, other: Any) -> Self:
        """The same of both runs of cells together."""
        ...


class Fitted(State):
    """A fitted density's numbers, of some cells."""


S = TypeVar("S", bound=Statistics)
F = TypeVar("F", bound=Fitted)
P = TypeVar("P", bound=Pooled)


class Density(ABC, Generic[S, F, P]):
    """A kind of density with its settings, immutable; holds no numbers of a fit."""

    kind: ClassVar[str]
    """As `--density` and model.json name it, and as its files begin."""

    statistics_kind: ClassVar[str]
    """What it is fitted from, and how these files begin: densities with the same are convertible
    into each other, and mergeable."""

    per_cell: ClassVar[bool] = True
    """Whether every cell has numbers of its own. Else one run of cells' are those of all."""

    @classmethod
    @abstractmethod
    def of_options(cls, options: Any) -> Self:
        """With the settings that `ModelOptions` hold."""

    @classmethod
    @abstractmethod
    def of_json(cls, value: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_json`, which also gives `kind`.

        Args:
            value: a JSON object that anybody may have written, without its `kind`.
            where: it stands, for errors.

        Raises:
            ModelError: if it can't be one.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The settings as JSON, `kind` included."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """The settings in words, by name."""

    @abstractmethod
    def empty(self, grid: PatchGrid, device: torch.device | str = "cpu") -> S:
        """Statistics of no images."""

    @abstractmethod
    def statistics(self, count: int, named: Named) -> S:
        """Statistics of `count` images from their `named` tensors, without a copy."""

    @abstractmethod
    def unpack_statistics(self, packed: Named) -> S:
        """Statistics from their `packed` tensors."""

    @abstractmethod
    def state_bytes(self, grid: PatchGrid) -> int:
        """Bytes of a group's statistics, by which they are cut into shards.

        The number of shards is part of the format: it must not change between versions.
        """

    @abstractmethod
    def pool(self, statistics: S) -> P:
        """What all runs of cells must share before they are fitted."""

    @abstractmethod
    def fit(self, statistics: S, pooled: P) -> F:
        """Fit the density of a run of cells.

        Args:
            statistics: the run's.
            pooled: of all runs together.

        Raises:
            ModelError: if there are too few images, or they hardly differ; a predicate, which
                follows the group's name.
        """

    @abstractmethod
    def empty_fitted(self, grid: PatchGrid, device: torch.device | str = "cpu") -> F:
        """Room for a fitted density, uninitialised."""

    @abstractmethod
    def unpack_fitted(self, packed: Named) -> F:
        """A fitted density from its `packed` tensors.

        Raises:
            ModelError: if they can't be one.
        """

    @abstractmethod
    def join(self, parts: Sequence[F]) -> F:
        """The fitted density of consecutive runs of cells."""

    def load(self, fitted: F, device: torch.device, dtype: torch.dtype) -> F:
        """Bring a fitted density to a device, as `distances` likes it best.

        Args:
            dtype: the embeddings'.
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
        """How unlikely the embeddings are: (P_0, B) float32, not negative, in nested order.

        Args:
            fitted: all cells', from `load`.
            left_out_of: the number of images that the density was fitted to, if these are some of
                them: each image's distances are then those to a density fitted without it.
            workers: threads that work side by side.
        """
