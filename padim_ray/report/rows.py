"""The rows of a run that its report shows: the most anomalous images, and failed ones.

Results are read as a stream and only rows that may be shown are kept, so memory doesn't grow with
the number of results.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.errors import ModelError, PadimError
from padim_ray.runs.run_directory import list_parts
from padim_ray.storage.location import Location
from padim_ray.storage.untrusted import (
    MAX_ROWS,
    MAX_TABLE_BYTES,
    check_sizes,
    decoded_batches,
    decoded_limit,
    parse_file,
)

READING_THREADS = 4
BATCH_ROWS = 4096
_SHOWN = """
    uri group status error score p_value threshold is_anomalous regions heatmap_uri width height
"""
_NOT_SHOWN = "size version_tag map_uri mask_uri model_version scored_at"
SHOWN, NOT_SHOWN = frozenset(_SHOWN.split()), frozenset(_NOT_SHOWN.split())
"""The jobs' own columns. All others were captured from image URIs or came with a manifest."""
Row = dict[str, Any]
_Key = tuple[float, float, str]


@dataclass
class Selection:
    """The rows with the highest scores, and the first failed ones by URI, up to a limit each.

    Ties are broken by URI, so that the result doesn't depend on the order of reading.
    """

    highest_limit: int
    failed_limit: int
    _highest: list[tuple[_Key, Row]] = field(default_factory=list)
    _failed: list[tuple[str, Row]] = field(default_factory=list)

    @property
    def highest(self) -> list[Row]:
        """Scored rows, by score over threshold; rows without a threshold come last, by score."""
        return [row for _, row in self._highest]

    @property
    def failed(self) -> list[Row]:
        """Failed rows, by URI."""
        return [row for _, row in self._failed]

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows of the results."""
        self._add_scored(batch)
        self._add_failed(batch)

    def merge(self, other: "Selection") -> None:
        """Add the rows that another selection kept."""
        self._highest = _first(self.highest_limit, self._highest + other._highest)
        self._failed = _first(self.failed_limit, self._failed + other._failed)

    def _add_scored(self, batch: pa.RecordBatch) -> None:
        score = _floats(batch, "score")
        ratio = _ratio(score, _floats(batch, "threshold"))
        candidates = ~np.isnan(score)
        if self.highest_limit == len(self._highest) > 0:
            lowest_ratio, lowest_score, _ = self._highest[-1][0]
            candidates &= (ratio > -lowest_ratio) | (
                (ratio == -lowest_ratio) & (score >= -lowest_score)
            )
        indices = np.flatnonzero(candidates)
        uris = batch["uri"].take(pa.array(indices)).to_pylist()
        keys = zip(-ratio[indices], -score[indices], uris, strict=True)
        kept = _first(self.highest_limit, zip(keys, indices, strict=True))
        self._highest = _first(self.highest_limit, self._highest + _with_rows(kept, batch))

    def _add_failed(self, batch: pa.RecordBatch) -> None:
        indices = np.flatnonzero(pc.equal(batch["status"], "failed").fill_null(False))
        uris = batch["uri"].take(pa.array(indices)).to_pylist()
        kept = _first(self.failed_limit, zip(uris, indices, strict=True))
        self._failed = _first(self.failed_limit, self._failed + _with_rows(kept, batch))


def select_rows(
    root: Location, *, highest: int, failed: int, parts: Sequence[str] | None = None
) -> Selection:
    """Select the rows to show from a run's results.

    Args:
        root: the run's directory.
        highest: the number of most anomalous images.
        failed: the number of failed images.
        parts: names of the results files to read; None reads all of them.

    Raises:
        PadimError: if a file can't be read.
    """
    files = list_parts(root) if parts is None else [root / f"results/{name}" for name in parts]
    shares = [files[first::READING_THREADS] for first in range(READING_THREADS)]

    def scan(share: list[Location]) -> Selection:
        selection = Selection(highest, failed)
        for file in share:
            _scan(root, file, selection)
        return selection

    with ThreadPoolExecutor(READING_THREADS) as pool:
        total, *others = pool.map(scan, shares)
    for other in others:
        total.merge(other)
    return total


def score_ratio(row: Row) -> float | None:
    """The score divided by the threshold, which makes groups comparable; None without either."""
    score, threshold = row.get("score"), row.get("threshold")
    if score is None or threshold is None or not threshold > 0:
        return None
    return score / threshold


def captured_columns(rows: Sequence[Row]) -> list[str]:
    """Names of the columns that came with the images, and not from the job."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in SHOWN]


def _scan(root: Location, file: Location, selection: Selection) -> None:
    """Add the rows of a results file, which anybody may have written."""

    def add(path: Path) -> None:
        with pq.ParquetFile(path) as parquet:
            schema, limit = parquet.schema_arrow, decoded_limit(path)
            check_sizes(parquet.metadata, range(MAX_ROWS), limit)
        for name, (described, is_kind) in _KINDS.items():
            if name not in schema.names and name not in _NEEDED:
                continue
            if schema.names.count(name) != 1 or not is_kind(schema.field(name).type):
                raise ModelError(f"it has no column {name!r} of {described}")
        columns = [name for name in schema.names if name not in NOT_SHOWN]
        for batch in decoded_batches(path, limit, columns, BATCH_ROWS):
            if any(batch[name].null_count for name in _NEEDED):
                raise ModelError("it has a row without a uri, a group or a status")
            selection.add(batch)

    try:
        parse_file(root, file, MAX_TABLE_BYTES, add)
    except FileNotFoundError as error:
        raise PadimError(f"{file.uri} is missing: the run's results are incomplete") from error
    except ModelError as error:
        raise PadimError(f"{error}. It is not a results file") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _is_flag(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _are_regions(kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    parts = {part.name: part.type for part in kind.value_type}
    return parts.keys() >= _REGION and all(map(_is_number, parts.values()))


_NEEDED = ("uri", "group", "status")
_REGION = {"x", "y", "width", "height", "peak", "area"}
_KINDS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    **dict.fromkeys((*_NEEDED, "error", "heatmap_uri"), ("text", _is_text)),
    **dict.fromkeys(("score", "p_value", "threshold", "width", "height"), ("numbers", _is_number)),
    "is_anomalous": ("true and false", _is_flag),
    "regions": ("lists of regions", _are_regions),
}


def _first(limit: int, items: Any) -> list[tuple[Any, Any]]:
    return heapq.nsmallest(limit, items, key=lambda item: item[0])


def _with_rows(kept: list[tuple[Any, Any]], batch: pa.RecordBatch) -> list[tuple[Any, Row]]:
    rows = batch.take(pa.array([index for _, index in kept], pa.int64())).to_pylist()
    return [(key, row) for (key, _), row in zip(kept, rows, strict=True)]


def _ratio(score: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Score over threshold; −1, which is below all ratios, where there is no threshold."""
    return np.divide(score, threshold, out=np.full_like(score, -1), where=threshold > 0)


def _floats(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64; NaN for nulls and for a missing column."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, math.nan)
    return batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
