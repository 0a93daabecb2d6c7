"""The files of a scoring run: their names and formats, and functions to read and write them."""

import io
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.runs.run_directory import PART, list_parts
from padim_ray.scoring.heatmap import output_name
from padim_ray.storage.location import Location
from padim_ray.storage.parquet import write_parquet

ATTEMPT = b"padim_ray.attempt"
"""Metadata key of a part with the attempt that wrote it, see `Output.new_attempt`."""
DRAWN = b"padim_ray.heatmaps_drawn"
"""Metadata key of a part whose heatmaps are drawn."""
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""For heatmaps of photographs: half the time of level 4, and the files are no larger."""
WRITING_THREADS = 8  # writing small files is bound by the store's latency
_STAGED = re.compile(r"distances-(\d{6,})-.+\.parquet")
_TYPES = {
    "loaded_groups": pa.list_(pa.string()),
    "causes": pa.map_(pa.string(), pa.int64()),
    "pixels": pa.map_(pa.string(), pa.large_binary()),
    "unreadable_masks": pa.map_(pa.string(), pa.string()),
}


@dataclass(frozen=True)
class Output:
    """Where a run's results go, and which of them are written.

    Attributes:
        root: directory of the run.
        prefix: common beginning of all images' URIs, which the names of heatmaps leave out.
        heatmaps: the images that get a heatmap, see `ScoreOptions`.
        top: number of images with the highest scores that get a heatmap.
        staged_top: number of them for which each shard keeps its cells' distances.
        maps: whether anomaly maps are written.
        min_region_area: area of the smallest reported region, in pixels of the image.
        run: identifies the run; --overwrite begins another one in the same directory.
    """

    root: Location
    prefix: str
    heatmaps: Literal["anomalous", "all", "none", "top"]
    top: int
    staged_top: int
    maps: bool
    min_region_area: int
    run: str = ""

    def part(self, shard: int) -> Location:
        """The shard's results; the shard is committed when this file exists."""
        return self.root / PART.format(shard)

    def new_attempt(self) -> str:
        """A name for one task's attempt to write a shard.

        A task may be cut off from Ray, be repeated on another node, and go on when nobody expects
        it any more. Each attempt has files of its own, and the part names the one that it is of.
        """
        return f"{self.run}-{secrets.token_hex(8)}"

    def is_own(self, attempt: str | None) -> bool:
        """Whether an attempt belongs to this run."""
        return attempt is not None and attempt.rpartition("-")[0] == self.run

    def staged(self, shard: int, attempt: str) -> Location:
        """Cells' distances of the shard's images that may get a heatmap."""
        return self.root / f".staging/distances-{shard:06d}-{attempt}.parquet"

    def staged_shards(self) -> set[int]:
        """The numbers of the shards whose distances are kept."""
        files = (self.root / ".staging").list_files()
        return {int(found[1]) for file in files if (found := _STAGED.fullmatch(file.name))}

    def heatmap(self, uri: str) -> Location:
        """The heatmap of an image."""
        return self.root / f"heatmaps/{output_name(uri, self.prefix, '.png')}"

    def map(self, uri: str) -> Location:
        """The anomaly map of an image."""
        return self.root / f"maps/{output_name(uri, self.prefix, '.tiff')}"

    def counts(self, shard: int, attempt: str) -> Location:
        """An evaluation's pixel counts of the shard."""
        return self.root / f".staging/counts-{shard:06d}-{attempt}.parquet"

    def check_complete(self, shards: int) -> None:
        """Check that the driver sees all parts that workers wrote.

        Raises:
            PadimError: if it doesn't.
        """
        found = len(list_parts(self.root))
        if found != shards:
            raise PadimError(
                f"{self.root.uri} holds {found} of the {shards} parts that workers wrote: on a "
                "cluster --out must be on storage that all nodes share"
            )

    def places(self) -> dict[str, str]:
        """URIs of the results by name, for the summary."""
        is_written = {
            "results": True,
            "heatmaps": self.heatmaps != "none",
            "maps": self.maps,
            "report.html": True,
        }
        return {name: (self.root / name).uri for name, written in is_written.items() if written}


def one_row(values: Mapping[str, Any]) -> pa.Table:
    """A table of one row; nested columns have their declared types."""
    return pa.table({name: pa.array([value], _TYPES.get(name)) for name, value in values.items()})


def attempt_of(part: pa.Schema) -> str | None:
    """The attempt that wrote a part; None if it is of an earlier padim-ray."""
    attempt = (part.metadata or {}).get(ATTEMPT)
    return None if attempt is None else attempt.decode()


def encode_part(results: pa.Table, attempt: str) -> bytes:
    """Encode a shard's rows as the content of its part."""
    buffer = io.BytesIO()
    results = results.replace_schema_metadata({ATTEMPT: attempt})
    write_parquet(results, buffer)
    return buffer.getvalue()


def encode_image(image: Image.Image, kind: Literal["PNG", "TIFF"]) -> bytes:
    """Encode an image as a file's content."""
    buffer = io.BytesIO()
    options: dict[str, Any] = PNG_OPTIONS if kind == "PNG" else {}
    image.save(buffer, kind, **options)
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
