"""What an earlier attempt at a scoring run has committed: shards with a results file."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from padim_ray.errors import PadimError
from padim_ray.failures import count_causes
from padim_ray.fetch import is_worth_another_try
from padim_ray.pipeline.results import DRAWN, Output
from padim_ray.run_directory import list_parts, part_number
from padim_ray.storage import Location

READING_THREADS = 16  # small files: they wait for the store


@dataclass(frozen=True)
class CommittedShard:
    """A shard whose rows are in the results.

    `scores` (n,): NaN where an image failed. `causes`: numbers of failed images. `may_improve`:
    some couldn't be fetched. `is_drawn`: its heatmaps were drawn. `counts`: what `count_pixels`
    counted, in an evaluation.
    """

    number: int
    scores: np.ndarray
    causes: dict[str, int]
    may_improve: bool
    is_drawn: bool
    counts: dict[str, Any]


def read_committed(output: Output, *, with_counts: bool) -> Iterator[CommittedShard]:
    """The shards that are done, in no order.

    Args:
        with_counts: the job counts pixels.

    Raises:
        PadimError: if a file is damaged.
    """

    def read(part: Location) -> CommittedShard:
        number = part_number(part)
        try:
            with part.as_local_file() as path, pq.ParquetFile(path) as file:
                table = file.read(["score", "error"])
                metadata = file.schema_arrow.metadata or {}
            counts = output.read_counts(number) if with_counts else {}
        except (OSError, ValueError, KeyError) as error:
            raise PadimError(f"{part.uri} is damaged: {error}; see --overwrite") from error
        errors = table["error"].to_pylist()
        return CommittedShard(
            number=number,
            scores=np.array(table["score"].to_pylist(), np.float32),  # None becomes NaN
            causes=count_causes(errors),
            may_improve=any(map(is_worth_another_try, errors)),
            is_drawn=DRAWN in metadata,
            counts=counts,
        )

    with ThreadPoolExecutor(READING_THREADS) as pool:
        yield from pool.map(read, list_parts(output.root))
