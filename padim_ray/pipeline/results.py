"""What a scoring run leaves on storage (see `run_directory`), and the tasks that write it.

What belongs to a shard is written before its part: the part says that the shard is done. Heatmaps
are drawn when all scores are known: only then are the highest ones known, and the scales.
"""

import io
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from padim_ray.anomaly_map import AnomalyMapper
from padim_ray.decision import Decision, Region, find_regions
from padim_ray.decoder import UprightImage, decode_all
from padim_ray.errors import ImageError, PadimError
from padim_ray.failures import count_causes
from padim_ray.fetch import Fetcher
from padim_ray.heatmap import draw_heatmap, output_name
from padim_ray.pipeline.columns import column_array
from padim_ray.pipeline.prometheus import stage
from padim_ray.preprocessing import Preprocessing
from padim_ray.run_directory import PART, list_parts
from padim_ray.sources import without_sources
from padim_ray.storage import Location

if TYPE_CHECKING:
    from padim_ray.artifact import ModelVersion  # brings torch, which helper tasks do without

DRAWN_TOGETHER = 16  # images, at their full size in memory
DRAWN = b"padim_ray.heatmaps_drawn"
"""In a part's metadata: its heatmaps are."""

LOADS = ("actor_id", "loaded_groups")
"""Columns of scored rows that tell of the Gaussians' loading."""

PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""On heatmaps of photographs half the time of level 4, and no larger."""

WRITING_THREADS = 8  # small files wait for the store, not for a processor

_REGIONS = pa.list_(
    pa.struct(
        {name: pa.int32() for name in ("x", "y", "width", "height")}
        | {"peak": pa.float32(), "area": pa.int64()}
    )
)
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
        return _read_table(self.counts(shard)).to_pylist()[0]

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


class WriteResults:
    """Scored rows in, a Parquet file out; the row that leaves here is for the driver.

    Writing a shard again replaces its file: Ray may run any task twice.

    Args:
        version: of the model, whose maps and geometry the results have.
        decisions: by group.
        count_pixels: counts an evaluation's pixels, from the rows and their maps; what it returns
            goes to the driver.
    """

    def __init__(
        self,
        output: Output,
        version: "ModelVersion",
        decisions: Mapping[str, Decision],
        count_pixels: Callable[[pa.Table, np.ndarray], dict[str, Any]] | None = None,
    ) -> None:
        self.output, self.model_version = output, version.number
        self.mapper, self.preprocessing = version.spec.mapper, version.spec.preprocessing
        self.decisions, self.count_pixels = decisions, count_pixels

    def __call__(self, shard: pa.Table) -> pa.Table:
        with stage("write", shard.num_rows):
            return self._write(shard)

    def _write(self, shard: pa.Table) -> pa.Table:
        number = shard["shard"][0].as_py()
        if pc.count_distinct(shard["shard"]).as_py() != 1:
            raise RuntimeError(f"shard {number} came with rows of another")
        if shard.num_rows != shard["shard_images"][0].as_py():
            raise RuntimeError(f"shard {number} came in pieces")
        decision = self.decisions[shard["group"][0].as_py()]
        scores = np.array(shard["score"].to_pylist(), np.float32)  # None becomes NaN
        flags = decision.flags(scores)
        distances = column_array(shard["distances"], np.float32, self.mapper.patches)
        self._stage(number, shard, flags)
        results = self._results(shard, decision, scores, flags, distances)
        counts = self.count_pixels(shard, self.mapper.maps(distances)) if self.count_pixels else {}
        if counts:
            self.output.counts(number).write_table(_one_row(counts))
        self.output.part(number).write_table(results)
        causes = list(count_causes(shard["error"].to_pylist()).items())
        told = {"shard": number, "scores": scores.tobytes(), "causes": causes}
        loads = {name: shard[name][0].as_py() for name in LOADS}
        return _one_row(told | loads | counts)

    def _results(
        self,
        shard: pa.Table,
        decision: Decision,
        scores: np.ndarray,
        flags: np.ndarray,
        distances: np.ndarray,
    ) -> pa.Table:
        count = shard.num_rows
        is_scored = np.isfinite(scores)
        is_judged = is_scored & (decision.threshold is not None)
        p_values = decision.p_values(scores)
        regions: list[list[Region] | None] = [[] if judged else None for judged in is_judged]
        for row, anomaly_map in zip(
            np.flatnonzero(flags), self.mapper.maps(distances[flags]), strict=True
        ):
            assert decision.pixel_threshold is not None  # nothing is flagged without a threshold
            width, height = (shard[name][row].as_py() for name in ("width", "height"))
            regions[row] = find_regions(
                anomaly_map,
                decision.pixel_threshold,
                self.preprocessing,
                width,
                height,
                self.output.min_region_area,
            )
        map_uris: list[str | None] = [None] * count
        if self.output.maps:
            map_uris = self._write_maps(shard["uri"].to_pylist(), is_scored, distances)
        now = pa.scalar(datetime.now(UTC), pa.timestamp("ms", tz="UTC"))
        threshold = [decision.threshold if judged else None for judged in is_judged]
        internal = {"shard", "shard_images", "distances", "width", "height", *LOADS}
        told = without_sources(shard)
        kept = told.select([name for name in told.column_names if name not in internal])
        for name, column in {
            "p_value": pa.array(p_values, mask=np.isnan(p_values)),
            "threshold": pa.array(threshold, pa.float32()),
            "is_anomalous": pa.array(flags, mask=~is_judged),
            "regions": pa.array(regions, _REGIONS),
            "heatmap_uri": pa.nulls(count, pa.string()),
            "map_uri": pa.array(map_uris, pa.string()),
            "width": shard["width"],
            "height": shard["height"],
            "model_version": pa.array([self.model_version] * count, pa.int32()),
            "scored_at": pa.repeat(now, count),
        }.items():
            kept = kept.append_column(name, column)
        return kept

    def _stage(self, number: int, shard: pa.Table, flags: np.ndarray) -> None:
        """Keep the patch distances of the images that may be drawn: flagged, or highest here."""
        if self.output.heatmaps == "none":
            return
        staged = shard.select(["uri", "score", "distances"]).append_column(
            "row", pa.array(range(shard.num_rows), pa.int32())
        )
        # flagged images are the highest; ties in the order of rows, like the driver's choice
        order = [("score", "descending"), ("row", "ascending")]
        count = {
            "all": shard.num_rows,
            "top": self.output.top,
            "anomalous": int(flags.sum()) + self.output.staged_top,
        }[self.output.heatmaps]
        self.output.staged(number).write_table(staged.sort_by(order).slice(0, count))

    def _write_maps(
        self, uris: list[str], is_scored: np.ndarray, distances: np.ndarray
    ) -> list[str | None]:
        files = {row: self.output.map(uris[row]) for row in np.flatnonzero(is_scored)}
        maps = self.mapper.maps(distances[is_scored])
        contents = (_encode(Image.fromarray(anomaly_map), "TIFF") for anomaly_map in maps)
        _write_all(zip(files.values(), contents, strict=True))
        return [files[row].uri if row in files else None for row in range(len(uris))]


class DrawHeatmaps:
    """Rows of a shard (`shard`, `row`, `source`) in, heatmaps out; then the results name them.

    Args:
        scales: the colours' two ends, by group.
    """

    def __init__(
        self,
        output: Output,
        mapper: AnomalyMapper,
        preprocessing: Preprocessing,
        scales: Mapping[str, tuple[float, float]],
        fetch: Fetcher,
        max_pixels: int,
    ) -> None:
        self.output, self.mapper, self.scales = output, mapper, scales
        self.preprocessing, self.fetch, self.wanted = preprocessing, fetch, UprightImage(max_pixels)

    def __call__(self, wanted: pa.Table) -> pa.Table:
        with stage("draw", wanted.num_rows):
            return self._draw_shard(wanted)

    def _draw_shard(self, wanted: pa.Table) -> pa.Table:
        number, scale = wanted["shard"][0].as_py(), self.scales[wanted["group"][0].as_py()]
        staged = _read_table(self.output.staged(number))
        staged = staged.filter(pc.is_in(staged["row"], wanted["row"].combine_chunks()))
        sources = dict(zip(wanted["row"].to_pylist(), wanted["source"].to_pylist(), strict=True))
        drawn: dict[int, str] = {}
        for start in range(0, staged.num_rows, DRAWN_TOGETHER):
            drawn.update(self._draw(staged.slice(start, DRAWN_TOGETHER), sources, scale))
        part = self.output.part(number)
        results = _read_table(part)
        uris = [drawn.get(row) for row in range(results.num_rows)]
        index = results.column_names.index("heatmap_uri")
        named = results.set_column(index, "heatmap_uri", pa.array(uris, pa.string()))
        part.write_table(named.replace_schema_metadata({DRAWN: b""}))
        return pa.table({"shard": [number], "drawn": [len(drawn)]})

    def _draw(
        self, staged: pa.Table, sources: Mapping[int, str], scale: tuple[float, float]
    ) -> dict[int, str]:
        """Draw and write heatmaps; their URIs by row."""
        uris, rows = staged["uri"].to_pylist(), staged["row"].to_pylist()
        maps = self.mapper.maps(column_array(staged["distances"], np.float32, self.mapper.patches))
        images = decode_all(self.fetch([sources[row] for row in rows]), self.wanted)
        drawn, files = {}, []
        for row, uri, anomaly_map, image in zip(rows, uris, maps, images, strict=True):
            if isinstance(image, ImageError):
                continue  # gone or replaced since it was scored: its row has no heatmap
            heatmap = draw_heatmap(image.pixels, anomaly_map, self.preprocessing, scale)
            location = self.output.heatmap(uri)
            files.append((location, _encode(heatmap, "PNG")))
            drawn[row] = location.uri
        _write_all(files)
        return drawn


def _one_row(values: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: pa.array([value], _KINDS.get(name)) for name, value in values.items()})


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **(PNG if kind == "PNG" else {}))
    return buffer.getvalue()


def _write_all(files: Iterable[tuple[Location, bytes]]) -> None:
    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        for done in [pool.submit(location.write, data) for location, data in files]:
            done.result()


def _read_table(location: Location) -> pa.Table:
    with location.as_local_file() as path:
        return pq.read_table(path)
