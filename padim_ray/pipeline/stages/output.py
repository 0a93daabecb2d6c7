"""A scoring run's files: where each one goes, and small helpers to write them."""

import io
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.runs.run_directory import PART, list_parts
from padim_ray.scoring.heatmap import output_name
from padim_ray.storage.location import Location

if TYPE_CHECKING:
    pass  # brings torch, which helper tasks do without

DRAWN = b"padim_ray.heatmaps_drawn"
"""In a part's metadata: its heatmaps are."""
LOADS = ("actor_id", "loaded_groups")
"""Columns of scored rows that tell of the Gaussians' loading."""
PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""On heatmaps of photographs half the time of level 4, and no larger."""
WRITING_THREADS = 8  # small files wait for the store, not for a processor
_KINDS = {
    "loaded_groups": pa.list_(pa.string()),
    "causes": pa.map_(pa.string(), pa.int64()),
    "pixels": pa.map_(pa.string(), pa.large_binary()),
    "unreadable_masks": pa.map_(pa.string(), pa.string()),
}


@dataclass(frozen=True)
class Output:
    """Where a run's results go and which there are.

    `prefix`: the beginning of all images' URIs that their heatmaps' names leave out. `top`: how
    many images with the highest scores get a heatmap. `staged_top`: how many of them a shard may
    hold. `min_region_area`: in pixels of the image.
    """

    root: Location
    prefix: str
    heatmaps: Literal["anomalous", "all", "none", "top"]
    top: int
    staged_top: int
    maps: bool
    min_region_area: int

    def part(self, shard: int) -> Location:
        return self.root / PART.format(shard)

    def staged(self, shard: int) -> Location:
        return self.root / f".staging/distances-{shard:06d}.parquet"

    def heatmap(self, uri: str) -> Location:
        return self.root / f"heatmaps/{output_name(uri, self.prefix, '.png')}"

    def map(self, uri: str) -> Location:
        return self.root / f"maps/{output_name(uri, self.prefix, '.tiff')}"

    def counts(self, shard: int) -> Location:
        return self.root / f".staging/counts-{shard:06d}.parquet"

    def read_counts(self, shard: int) -> dict[str, Any]:
        """What `count_pixels` counted in a shard that was written."""
        return read_parquet(self.counts(shard)).to_pylist()[0]

    def check_complete(self, shards: int) -> None:
        """Raises: PadimError if the driver doesn't find every part that workers wrote."""
        found = len(list_parts(self.root))
        if found != shards:
            raise PadimError(
                f"{self.root.uri} holds {found} of {shards} parts that workers wrote: on a cluster "
                "the results need storage that all nodes share"
            )

    def places(self) -> dict[str, str]:
        """What is where, for the summary."""
        names = {
            "results": True,
            "heatmaps": self.heatmaps != "none",
            "maps": self.maps,
            "report.html": True,
        }
        return {name: (self.root / name).uri for name, there in names.items() if there}


def one_row(values: Mapping[str, Any]) -> pa.Table:
    """A table of one row, with the columns' own types."""
    return pa.table({name: pa.array([value], _KINDS.get(name)) for name, value in values.items()})


def encode_image(image: Image.Image, kind: str) -> bytes:
    """Encode an image as PNG or TIFF."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **(PNG if kind == "PNG" else {}))
    return buffer.getvalue()


def write_all(files: Iterable[tuple[Location, bytes]]) -> None:
    """Write files concurrently."""
    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        for done in [pool.submit(location.write, data) for location, data in files]:
            done.result()


def read_parquet(location: Location) -> pa.Table:
    """Read a whole Parquet file."""
    with location.as_local_file() as path:
        return pq.read_table(path)
