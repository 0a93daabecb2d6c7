"""A model version that is being written, and its groups' files."""

from dataclasses import dataclass

from padim_ray.densities.base import Fitted, Statistics
from padim_ray.errors import ModelError
from padim_ray.model.layout import shard_location, state_shards, version_location
from padim_ray.model.publish import save_tensors
from padim_ray.model.spec import ModelSpec
from padim_ray.storage.location import Location


@dataclass(frozen=True)
class DraftVersion:
    """A version before it is published; `publish` does that last.

    Attributes:
        root: the model's directory.
        number: the version's number.
        spec: the model's specification.
        shards: the number of shards of every group's statistics.
    """

    root: Location
    number: int
    spec: ModelSpec
    shards: int

    @classmethod
    def of(cls, root: Location, number: int, spec: ModelSpec) -> "DraftVersion":
        """A draft with as many shards as the format prescribes."""
        return cls(root, number, spec, len(state_shards(spec)))

    @property
    def location(self) -> Location:
        return version_location(self.root, self.number)

    @property
    def density_shards(self) -> int:
        """The number of shards of every group's fitted density, for the same runs of cells."""
        return self.shards if self.spec.density.per_cell else 1

    def save_statistics(self, group: str, shard: int, statistics: Statistics) -> None:
        """Write a shard of a group's statistics."""
        save_tensors(self.statistics_file(group, shard), statistics.packed())

    def save_density(self, group: str, shard: int, fitted: Fitted) -> None:
        """Write a shard of a group's fitted density."""
        save_tensors(self.density_file(group, shard), fitted.packed())

    def check_written(self, group: str) -> None:
        """Check that this process sees all files of a group, which workers wrote.

        Raises:
            ModelError: if a file is missing.
        """
        for location in (
            *(self.statistics_file(group, shard) for shard in range(self.shards)),
            *(self.density_file(group, shard) for shard in range(self.density_shards)),
        ):
            if not location.exists():
                raise ModelError(
                    f"A worker wrote {location.uri}, which isn't there: on a cluster the model "
                    "needs storage that all nodes share"
                )

    def statistics_file(self, group: str, shard: int) -> Location:
        """The file of a shard of a group's statistics."""
        kind = self.spec.density.statistics_kind
        return shard_location(self.root, self.number, group, kind, shard, self.shards)

    def density_file(self, group: str, shard: int) -> Location:
        """The file of a shard of a group's fitted density."""
        kind = self.spec.density.kind
        return shard_location(self.root, self.number, group, kind, shard, self.density_shards)
