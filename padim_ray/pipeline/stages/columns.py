"""Arrays of equal shape as Arrow columns of bytes, without a copy in either direction."""

import numpy as np
import pyarrow as pa


def fixed_size_column(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Arrays (n, …) as an Arrow column of n fixed-size binary values, without a copy."""
    kind = pa.binary(rows[0].nbytes)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])


def column_array(
    column: pa.ChunkedArray, dtype: np.dtype | type, shape: tuple[int, ...]
) -> np.ndarray:
    """A fixed-size binary column as an array (n, *shape), without a copy if it has one chunk."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * chunk.type.byte_width : (chunk.offset + len(chunk))
            * chunk.type.byte_width
        ]
        for chunk in column.chunks
    ]
    data = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.empty(0, np.uint8)])
    return data.view(dtype).reshape(-1, *shape)
