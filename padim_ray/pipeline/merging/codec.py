"""Encode statistics as bytes in an Arrow row, or as arrays in Ray's object store, without copies.

A *partial sum* is the statistics of one batch of images of one group, in one shard of cells. It
travels as a row that `partial_sum_row` makes.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities.base import Density, Statistics

ALIGNMENT = 64  # bytes, like Arrow's buffers


def partial_sum_row(
    group: str, shard: int, statistics: Statistics | None, failures: Mapping[str, str]
) -> pa.Table:
    """Encode a partial sum as a table of one row.

    Args:
        group: the images' group.
        shard: number of the shard of cells.
        statistics: statistics of the readable images, on the CPU; None if there are none.
        failures: errors of the other images, by URI.

    Returns:
        Columns `group`, `shard`, `count` (of images in the statistics), `failures`, `uris` (empty),
        `names` (of the tensors) and `state` (the tensors' bytes).
    """
    named = {} if statistics is None else statistics.named
    count = statistics.count if statistics else 0
    return encode_row(group, shard, count, named, failures=failures)


def encode_row(
    group: str,
    shard: int,
    count: int,
    named: Mapping[str, torch.Tensor],
    *,
    failures: Mapping[str, str] | None = None,
    uris: Sequence[str] = (),
) -> pa.Table:
    """A row with these tensors' bytes as `state`; see `partial_sum_row` for the columns."""
    buffer = _serialise(named)
    return pa.table(
        {
            "group": pa.array([group], pa.string()),
            "shard": pa.array([shard], pa.int32()),
            "count": pa.array([count], pa.int64()),
            "failures": pa.array(
                [list((failures or {}).items())], pa.map_(pa.string(), pa.string())
            ),
            "uris": pa.array([list(uris)], pa.list_(pa.string())),
            "names": pa.array([list(named)], pa.list_(pa.string())),
            "state": pa.LargeBinaryArray.from_buffers(  # without a copy
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, buffer.size])), buffer]
            ),
        }
    )


def _serialise(named: Mapping[str, torch.Tensor]) -> pa.Buffer:
    tensors = [pa.Tensor.from_numpy(tensor.numpy()) for tensor in named.values()]
    size = sum(map(pa.ipc.get_tensor_size, tensors))
    # PyTorch allocates it in large pages; the padding keeps concatenated rows aligned
    buffer = pa.py_buffer(torch.zeros(-(-size // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8).numpy())
    with pa.FixedSizeBufferWriter(buffer) as writer:
        for tensor in tensors:
            pa.ipc.write_tensor(tensor, writer)
    return buffer


@dataclass(frozen=True)
class StatisticsArrays:
    """Statistics as arrays, which Ray's object store shares without a copy, unlike tensors.

    Attributes:
        count: number of images.
        arrays: the statistics' tensors by name.
    """

    count: int
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, statistics: Statistics) -> "StatisticsArrays":
        """View the tensors of statistics as arrays."""
        arrays = {name: tensor.numpy() for name, tensor in statistics.named.items()}
        return cls(statistics.count, arrays)

    @classmethod
    def of_row(cls, row: pa.Table) -> "StatisticsArrays":
        """View the bytes of a row that `partial_sum_row` made as arrays."""
        return cls(row["count"][0].as_py(), read_arrays(row))


def read_arrays(row: pa.Table) -> dict[str, np.ndarray]:
    """View the tensors that `encode_row` encoded as arrays, by name."""
    with pa.BufferReader(_only_value(row["state"])) as reader:
        return {name: pa.ipc.read_tensor(reader).to_numpy() for name in row["names"][0].as_py()}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """View an array as a tensor. Don't write to it: Ray's arrays are read-only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of read-only arrays; nothing writes to them
        return torch.from_numpy(array)


def _only_value(column: pa.ChunkedArray) -> pa.Buffer:
    """The bytes of a large binary column with one value; a scalar's `as_buffer` would copy them."""
    (chunk,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = chunk.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return data.slice(start, stop - start)


def read_statistics(density: Density, row: int | None, value: Any) -> Statistics:
    """Decode statistics that were sent to a task, without a copy.

    Args:
        density: whose statistics they are.
        row: row of a block of partial sums; None if `value` is what another task returned.
        value: the block, or the other task's `StatisticsArrays`.
    """
    stored = value if row is None else StatisticsArrays.of_row(value.slice(row, 1))
    named = {name: as_tensor(array) for name, array in stored.arrays.items()}
    return density.statistics(stored.count, named)
