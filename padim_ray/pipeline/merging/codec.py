"""Statistics as bytes in an Arrow row, and as arrays in Ray's object store: both without copies.

A *partial sum* is the statistics of one batch of images of one group, in one shard of cells. It is
a row as `partial_sum_row` makes it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities.base import Density, Statistics

ALIGNMENT = 64  # bytes, as Arrow has it


def partial_sum_row(
    group: str, shard: int, statistics: Statistics | None, failures: Mapping[str, str]
) -> pa.Table:
    """A row that leaves the actor that adds images.

    Args:
        group: of the images.
        shard: the run of cells.
        statistics: of the images that could be read, on the CPU; None if there are none.
        failures: errors by URI, of the images that couldn't.
    """
    named = {} if statistics is None else statistics.named
    buffer = _serialise(named)
    return pa.table(
        {
            "group": pa.array([group], pa.string()),
            "shard": pa.array([shard], pa.int32()),
            "count": pa.array([statistics.count if statistics else 0], pa.int64()),
            "failures": pa.array([list(failures.items())], pa.map_(pa.string(), pa.string())),
            "names": pa.array([list(named)], pa.list_(pa.string())),
            "state": pa.LargeBinaryArray.from_buffers(  # without a copy
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, buffer.size])), buffer]
            ),
        }
    )


def _serialise(named: Mapping[str, torch.Tensor]) -> pa.Buffer:
    tensors = [pa.Tensor.from_numpy(tensor.numpy()) for tensor in named.values()]
    size = sum(map(pa.ipc.get_tensor_size, tensors))
    # memory of PyTorch's, whose pages are large; rows that follow each other stay aligned
    buffer = pa.py_buffer(torch.zeros(-(-size // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8).numpy())
    with pa.FixedSizeBufferWriter(buffer) as writer:
        for tensor in tensors:
            pa.ipc.write_tensor(tensor, writer)
    return buffer


@dataclass(frozen=True)
class StatisticsArrays:
    """Statistics as arrays, which Ray's object store shares without a copy, unlike tensors."""

    count: int
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, statistics: Statistics) -> "StatisticsArrays":
        arrays = {name: tensor.numpy() for name, tensor in statistics.named.items()}
        return cls(statistics.count, arrays)

    @classmethod
    def of_row(cls, row: pa.Table) -> "StatisticsArrays":
        """Views of a row that `partial_sum_row` made."""
        with pa.BufferReader(row["state"][0].as_buffer()) as reader:
            arrays = {
                name: pa.ipc.read_tensor(reader).to_numpy() for name in row["names"][0].as_py()
            }
        return cls(row["count"][0].as_py(), arrays)


def read_statistics(density: Density, row: int | None, value: Any) -> Statistics:
    """Statistics as they travel: in a row of a block, or (None) as a task returned them."""
    stored = value if row is None else StatisticsArrays.of_row(value.slice(row, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the arrays are read-only, and nothing writes to them
        named = {name: torch.from_numpy(array) for name, array in stored.arrays.items()}
    return density.statistics(stored.count, named)
