"""Cut a sorted manifest into shards, and draw samples for calibration from it."""

import hashlib

import numpy as np
import pyarrow as pa

from padim_ray.images.manifest import group_counts


def shard_rows(manifest: pa.Table, images: int) -> list[slice]:
    """Cut a sorted manifest into shards of one group and at most `images` images each.

    Returns:
        Each shard's rows, in order.
    """
    shards, start = [], 0
    for count in group_counts(manifest).values():
        end = start + count
        while start < end:
            stop = min(start + images, end)
            shards.append(slice(start, stop))
            start = stop
    return shards


def shard_table(manifest: pa.Table, number: int, rows: slice) -> pa.Table:
    """A shard as one block of the pipelines.

    Columns `shard` and `shard_images` are added: the shard's number, and its number of images.
    """
    shard = manifest.slice(rows.start, rows.stop - rows.start)
    for name, value in (("shard", number), ("shard_images", shard.num_rows)):
        column = pa.repeat(pa.scalar(value, pa.int32()), shard.num_rows)
        shard = shard.append_column(name, column)
    return shard


def sample_images(manifest: pa.Table, count: int, seed: int) -> np.ndarray:
    """Draw at most `count` images of each group of a sorted manifest.

    The draw depends on a hash of each URI, so a sample changes little when images are added.

    Returns:
        The rows of the sample, ascending.
    """
    rows, start = [], 0
    for images in group_counts(manifest).values():
        chosen = np.arange(images)
        if images > count:
            uris = manifest["uri"].slice(start, images).to_pylist()
            hashes = np.array([_hash(uri, seed) for uri in uris], np.uint64)
            chosen = np.sort(np.argpartition(hashes, count)[:count])
        rows.append(start + chosen)
        start += images
    return np.concatenate([*rows, np.empty(0, int)])


def _hash(uri: str, seed: int) -> int:
    digest = hashlib.blake2b(uri.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")
