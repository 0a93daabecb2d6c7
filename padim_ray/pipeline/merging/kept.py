"""Embeddings that are kept from the pass that sums them up, to calibrate their group.

So the images needn't be fetched and embedded again. They leave the actors in rows beside the
partial sums, and stay in Ray's object store until the version is calibrated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from padim_ray.features.grid import Embeddings
from padim_ray.pipeline.merging.codec import as_tensor, encode_row, read_arrays

KEPT = -1
"""`shard` of a row that holds embeddings and no partial sum."""


def kept_row(group: str, uris: Sequence[str], embeddings: Embeddings) -> pa.Table:
    """Encode embeddings as a row with the columns of `partial_sum_row`; `shard` is `KEPT`.

    Args:
        group: the images' group.
        uris: of the images, one for each embedding.
        embeddings: on any device.
    """
    levels = {str(level): each.cpu() for level, each in enumerate(embeddings.unpadded())}
    # NumPy has no bfloat16
    bits = {
        name: each.view(torch.int16) if each.dtype == torch.bfloat16 else each
        for name, each in levels.items()
    }
    return encode_row(group, KEPT, len(uris), bits, uris=uris)


@dataclass(frozen=True)
class KeptEmbeddings:
    """Embeddings of some images of a group as arrays.

    Attributes:
        uris: of the images.
        levels: per level (n, P_ℓ, c_ℓ), float32, or int16 with the bits of bfloat16.
    """

    uris: Sequence[str]
    levels: Sequence[np.ndarray]

    @classmethod
    def of_row(cls, row: pa.Table) -> "KeptEmbeddings":
        """View the bytes of a row that `kept_row` made as arrays."""
        return cls(row["uris"][0].as_py(), list(read_arrays(row).values()))

    def embeddings(self) -> Embeddings:
        """The embeddings, on the CPU. Don't write to them."""
        levels = [
            level.view(torch.bfloat16) if level.dtype == torch.int16 else level
            for level in map(as_tensor, self.levels)
        ]
        return Embeddings(tuple(levels), tuple(level.shape[2] for level in levels))


@dataclass(frozen=True)
class Kept:
    """Where kept embeddings are.

    Attributes:
        ref: a reference to a sequence of `KeptEmbeddings`.
        index: position in the sequence.
        images: number of images.
    """

    ref: ray.ObjectRef
    index: int
    images: int
