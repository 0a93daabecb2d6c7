"""Cut a sorted manifest into shards, and draw calibration samples from it."""

import hashlib

import numpy as np
import pyarrow as pa

from padim_ray.images.manifest import group_counts


def sample_images(manifest: pa.Table, count: int, seed: int) -> np.ndarray:
    """The rows of at most `count` images of each group, ascending; `manifest` must be sorted.

    An image's chance is a hash of its URI: when images are added, a sample keeps most of its own.
    """
    rows, start = [], 0
    for images in group_counts(manifest).values():
        chosen = np.arange(images)
        if images > count:
            uris = manifest["uri"].slice(start, images).to_pylist()
            chances = np.array([_chance(uri, seed) for uri in uris], np.uint64)
            chosen = np.sort(np.argpartition(chances, count)[:count])
        rows.append(start + chosen)
        start += images
    return np.concatenate([*rows, np.empty(0, int)])


def _chance(uri: str, seed: int) -> int:
    digest = hashlib.blake2b(uri.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")


def shard_rows(manifest: pa.Table, images: int) -> list[slice]:
    """The rows of shards of one group and at most `images` images each, of a sorted manifest."""
    shards, start = [], 0
    for count in group_counts(manifest).values():
        end = start + count
        while start < end:
            stop = min(start + images, end)
            shards.append(slice(start, stop))
            start = stop
    return shards


def shard_table(manifest: pa.Table, number: int, rows: slice) -> pa.Table:
    """A shard as it travels through the pipelines, as one block.

    Columns `shard` and `shard_images` hold its number and its length.
    """
    shard = manifest.slice(rows.start, rows.stop - rows.start)
    for name, value in (("shard", number), ("shard_images", shard.num_rows)):
        column = pa.repeat(pa.scalar(value, pa.int32()), shard.num_rows)
        shard = shard.append_column(name, column)
    return shard
