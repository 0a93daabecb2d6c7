"""Statistics as bytes in an Arrow row, and as arrays in the object store."""

import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities.gaussian.moments import Moments


def describe_sum(
    group: str, shard: int, count: int, state: pa.Buffer, failures: dict[str, str]
) -> pa.Table:
    """A row as `PartialSums` makes them."""
    return pa.table(
        {
            "group": pa.array([group], pa.string()),
            "shard": pa.array([shard], pa.int32()),
            "count": pa.array([count], pa.int64()),
            "failures": pa.array([list(failures.items())], pa.map_(pa.string(), pa.string())),
            "state": pa.LargeBinaryArray.from_buffers(  # without a copy
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, state.size])), state]
            ),
        }
    )


ALIGNED = 64  # bytes, as Arrow has it


def serialise(state: Moments) -> pa.Buffer:
    """Moments in one buffer, for a row of a block: they are read from there without a copy."""
    tensors = [pa.Tensor.from_numpy(tensor.numpy()) for tensor in state.tensors]
    size = sum(map(pa.ipc.get_tensor_size, tensors))
    # one of PyTorch's own, whose pages are large; rows that follow each other stay aligned
    buffer = pa.py_buffer(torch.zeros(-(-size // ALIGNED) * ALIGNED, dtype=torch.uint8).numpy())
    with pa.FixedSizeBufferWriter(buffer) as writer:
        for tensor in tensors:
            pa.ipc.write_tensor(tensor, writer)
    return buffer


def read_moments(row: int | None, value: Any) -> Moments:
    """What a `Source` refers to."""
    return value.moments() if row is None else _deserialise(value.slice(row, 1))


def _deserialise(partial: pa.Table) -> Moments:
    """The moments in a row of a block, as views of it."""
    buffer = partial["state"][0].as_buffer()
    tensors: list[np.ndarray] = []
    with pa.BufferReader(buffer) as reader:
        while buffer.size - reader.tell() >= ALIGNED:
            tensors.append(pa.ipc.read_tensor(reader).to_numpy())
    means = [tensor for tensor in tensors if tensor.ndim == 2]
    blocks = iter(tensors[len(means) :])
    rows = [tuple(islice(blocks, len(means) - level)) for level in range(len(means))]
    return MomentArrays(partial["count"][0].as_py(), tuple(means), tuple(rows)).moments()


@dataclass(frozen=True)
class MomentArrays:
    """Moments as arrays, which Ray's object store shares without a copy, unlike tensors."""

    count: int
    means: tuple[np.ndarray, ...]
    scatters: tuple[tuple[np.ndarray, ...], ...]

    @classmethod
    def of(cls, state: Moments) -> "MomentArrays":
        return cls(
            state.count,
            tuple(mean.numpy() for mean in state.means),
            tuple(tuple(block.numpy() for block in row) for row in state.scatters),
        )

    def moments(self) -> Moments:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arrays are read-only, and nothing writes to them
            return Moments(
                self.count,
                tuple(map(torch.from_numpy, self.means)),
                tuple(tuple(map(torch.from_numpy, row)) for row in self.scatters),
            )
