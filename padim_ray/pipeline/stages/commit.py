"""Commit scored shards as Parquet files, and read back what earlier attempts committed.

A shard's part is written after all other files of the shard, because the part marks the shard as
done (see `run_directory`). Heatmaps are drawn when all scores are known, since the highest scores
and the colour scales depend on all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.images.sources import without_sources
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.stages.columns import column_array
from padim_ray.pipeline.stages.output import (
    DRAWN,
    Output,
    attempt_of,
    encode_image,
    encode_part,
    one_row,
    read_parquet,
    write_all,
)
from padim_ray.runs.failures import count_causes
from padim_ray.runs.run_directory import list_parts, part_number
from padim_ray.scoring.decision import Decision
from padim_ray.scoring.regions import Region, find_regions
from padim_ray.storage.location import Location

if TYPE_CHECKING:
    from padim_ray.model.version import ModelVersion  # imports torch, which helper tasks don't need

LOADS = ("actor_id", "loaded_groups")
"""Columns of scored rows that say which densities were loaded, and by which actor."""
READING_THREADS = 16  # reading small files is bound by the store's latency
_REGIONS = pa.list_(
    pa.struct(
        {name: pa.int32() for name in ("x", "y", "width", "height")}
        | {"peak": pa.float32(), "area": pa.int64()}
    )
)


class WriteResults:
    """Commits a shard: takes scored rows, writes a Parquet file, returns a row for the driver.

    Ray may run any task twice, and a task that was cut off may go on after its shard was committed
    and its heatmaps were drawn. So a part is created and never replaced here; a task that finds one
    returns what that holds.

    Args:
        output: where the results go.
        version: the model's version, which defines maps and preprocessing.
        decisions: thresholds and p-values by group.
        count_pixels: counts an evaluation's pixels. It is given a shard's rows and anomaly maps,
            and returns columns for the driver.
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
            raise RuntimeError(f"a block has rows of shard {number} and of another one")
        if shard.num_rows != shard["shard_images"][0].as_py():
            raise RuntimeError(f"a block has only some of shard {number}'s rows")
        decision = self.decisions[shard["group"][0].as_py()]
        scores = np.array(shard["score"].to_pylist(), np.float32)  # None becomes NaN
        flags = decision.flags(scores)
        distances = column_array(shard["distances"], np.float32, self.mapper.patches)
        attempt = self.output.new_attempt()
        self._stage(number, attempt, shard, flags)
        results = self._results(shard, decision, scores, flags, distances)
        counts = self.count_pixels(shard, self.mapper.maps(distances)) if self.count_pixels else {}
        if counts:
            self.output.counts(number, attempt).write_table(one_row(counts))
        causes = count_causes(shard["error"].to_pylist())
        part = self.output.part(number)
        try:
            part.create(encode_part(results, attempt))
        except FileExistsError:
            committed = read_part(self.output, part, with_counts=bool(self.count_pixels))
            if not self.output.is_own(committed.attempt):
                raise PadimError(
                    f"{part.uri} was written by a task of the run that --overwrite replaced; the "
                    "same command without it continues"
                ) from None
            scores, counts = committed.scores, committed.counts
            causes = count_causes(committed.errors)
        outcome = {"shard": number, "scores": scores.tobytes(), "causes": list(causes.items())}
        loads = {name: shard[name][0].as_py() for name in LOADS}
        return one_row(outcome | loads | counts)

    def _results(
        self,
        shard: pa.Table,
        decision: Decision,
        scores: np.ndarray,
        flags: np.ndarray,
        distances: np.ndarray,
    ) -> pa.Table:
        """The rows of the results, see docs/results.md."""
        count = shard.num_rows
        is_scored = np.isfinite(scores)
        is_judged = is_scored & (decision.threshold is not None)
        p_values = decision.p_values(scores)
        regions: list[list[Region] | None] = [[] if judged else None for judged in is_judged]
        for row, anomaly_map in zip(
            np.flatnonzero(flags), self.mapper.maps(distances[flags]), strict=True
        ):
            assert decision.pixel_threshold is not None  # there is one wherever images are flagged
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
        results = without_sources(shard)
        results = results.select([name for name in results.column_names if name not in internal])
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
            results = results.append_column(name, column)
        return results

    def _stage(self, number: int, attempt: str, shard: pa.Table, flags: np.ndarray) -> None:
        """Keep the distances of the images that may get a heatmap: flagged ones and the highest."""
        if self.output.heatmaps == "none":
            return
        staged = shard.select(["uri", "score", "distances"]).append_column(
            "row", pa.array(range(shard.num_rows), pa.int32())
        )
        # the flagged images come first; ties keep the rows' order, as in the driver's choice
        order = [("score", "descending"), ("row", "ascending")]
        count = {
            "all": shard.num_rows,
            "top": self.output.top,
            "anomalous": int(flags.sum()) + self.output.staged_top,
        }[self.output.heatmaps]
        file = self.output.staged(number, attempt)
        file.write_table(staged.sort_by(order).slice(0, count))

    def _write_maps(
        self, uris: list[str], is_scored: np.ndarray, distances: np.ndarray
    ) -> list[str | None]:
        """Write anomaly maps of scored images; return their URIs, None for the other rows."""
        files = {row: self.output.map(uris[row]) for row in np.flatnonzero(is_scored).tolist()}
        maps = self.mapper.maps(distances[is_scored])
        contents = (encode_image(Image.fromarray(anomaly_map), "TIFF") for anomaly_map in maps)
        write_all(zip(files.values(), contents, strict=True))
        return [files[row].uri if row in files else None for row in range(len(uris))]


@dataclass(frozen=True)
class CommittedShard:
    """A shard whose rows are in the results.

    Attributes:
        number: the shard's number.
        attempt: the attempt that wrote it; None if an earlier padim-ray did.
        scores: (n,) float32, NaN where an image failed.
        errors: of the images that failed.
        is_drawn: whether its heatmaps are drawn.
        counts: an evaluation's pixel counts, otherwise empty.
    """

    number: int
    attempt: str | None
    scores: np.ndarray
    errors: list[str]
    is_drawn: bool
    counts: dict[str, Any]

    @property
    def mask_errors(self) -> list[str]:
        """The errors of masks that couldn't be read."""
        return [error for _, error in self.counts.get("unreadable_masks", [])]


def read_committed(output: Output, *, with_counts: bool) -> Iterator[CommittedShard]:
    """Read the shards that are committed.

    Args:
        output: the run's files.
        with_counts: whether the job counts pixels.

    Raises:
        PadimError: if a file is damaged.
    """

    def read(part: Location) -> CommittedShard:
        return read_part(output, part, with_counts=with_counts)

    with ThreadPoolExecutor(READING_THREADS) as pool:
        yield from pool.map(read, list_parts(output.root))


def read_part(output: Output, part: Location, *, with_counts: bool) -> CommittedShard:
    """Read one committed shard; see `read_committed`.

    Pixel counts are read for shards of this run only: others are scored again.
    """
    number = part_number(part)
    try:
        with part.as_local_file() as path, pq.ParquetFile(path) as file:
            table = file.read(["score", "error"])
            schema = file.schema_arrow
        scores, errors = (table[name].to_pylist() for name in ("score", "error"))
        attempt, counts = attempt_of(schema), {}
        if with_counts and attempt is not None and output.is_own(attempt):
            (counts,) = read_parquet(output.counts(number, attempt)).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise PadimError(f"{part.uri} is damaged: {error}; see --overwrite") from error
    return CommittedShard(
        number=number,
        attempt=attempt,
        scores=np.array(scores, np.float32),  # None becomes NaN
        errors=[error for error in errors if error],
        is_drawn=DRAWN in (schema.metadata or {}),
        counts=counts,
    )
