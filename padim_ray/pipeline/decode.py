"""The stage that fetches and decodes images: a shard of the manifest in, its pixels out."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from padim_ray.errors import ImageError
from padim_ray.images import decode, model_input
from padim_ray.pipeline.columns import fixed_size_column
from padim_ray.preprocessing import Preprocessing
from padim_ray.storage import Location

SHARD_BYTES = 48 * 2**20  # of decoded pixels: well below the size at which Ray Data splits blocks
MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 64, 256
WINDOW_BYTES = 64 * 2**20  # of encoded images: fetched together, while the last window is decoded
WINDOW_IMAGES = 64


def images_per_shard(images: int, preprocessing: Preprocessing, workers: int) -> int:
    """A shard's length: a bounded block of pixels, and on small sets a few shards per worker."""
    height, width = preprocessing.size
    fair = max(-(-images // (4 * workers)), MIN_SHARD_IMAGES)
    return max(1, min(fair, MAX_SHARD_IMAGES, SHARD_BYTES // (3 * height * width)))


class FetchAndDecode:
    """Adds to manifest rows `image` (H·W·3 bytes), `status`, `error`, `width` and `height`.

    An image that can't be fetched or decoded becomes a row with `status = "failed"`.
    """

    def __init__(self, preprocessing: Preprocessing, storage_options: Mapping[str, Any]) -> None:
        self.preprocessing = preprocessing
        self.storage_options = dict(storage_options)

    def __call__(self, shard: pa.Table) -> pa.Table:
        height, width = self.preprocessing.size
        pixels = np.zeros((shard.num_rows, height, width, 3), np.uint8)
        errors: list[str | None] = []
        sizes: list[tuple[int, int] | tuple[None, None]] = []
        for row, content in enumerate(self._fetch(shard)):
            try:
                if isinstance(content, ImageError):
                    raise content
                image = decode(content)
                pixels[row] = model_input(image, self.preprocessing)
            except ImageError as error:
                errors.append(str(error))
                sizes.append((None, None))
            else:
                errors.append(None)
                sizes.append((image.shape[1], image.shape[0]))
        columns = {
            "image": fixed_size_column(pixels),
            "status": pa.array(["failed" if error else "scored" for error in errors]),
            "error": pa.array(errors, pa.string()),
            "width": pa.array([width for width, _ in sizes], pa.int32()),
            "height": pa.array([height for _, height in sizes], pa.int32()),
        }
        for name, column in columns.items():
            shard = shard.append_column(name, column)
        return shard

    def _fetch(self, shard: pa.Table) -> Iterator[bytes | ImageError]:
        """The rows' encoded images in order; the next window is on its way during decoding."""
        uris = shard["uri"].to_pylist()
        windows = list(_windows(shard["size"].to_pylist()))
        with ThreadPoolExecutor(1) as pool:
            ahead = [
                pool.submit(fetch, uris[start:stop], self.storage_options)
                for start, stop in windows[:1]
            ]
            for following in [*windows[1:], None]:
                contents = ahead.pop().result()
                if following:
                    following_uris = uris[slice(*following)]
                    ahead.append(pool.submit(fetch, following_uris, self.storage_options))
                yield from contents


def fetch(uris: Sequence[str], storage_options: Mapping[str, Any]) -> list[bytes | ImageError]:
    """Read files concurrently; a failure takes the place of the content."""
    contents: dict[str, bytes | ImageError] = {}
    for _, same_store in groupby(sorted(uris), key=_scheme):
        contents.update(_fetch_from_one_store(list(same_store), storage_options))
    return [contents[uri] for uri in uris]


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else ""


def _fetch_from_one_store(
    uris: list[str], storage_options: Mapping[str, Any]
) -> dict[str, bytes | ImageError]:
    fs = Location.of(uris[0], storage_options).fs
    paths = [Location(uri, storage_options).path for uri in uris]
    # cat() would take brackets and stars in names for patterns
    everything = [None] * len(paths)
    contents = fs.cat_ranges(paths, everything, everything, on_error="return")
    return {uri: _content(content) for uri, content in zip(uris, contents, strict=True)}


def _windows(sizes: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    start, total = 0, 0
    for row, size in enumerate(sizes):
        total += size or 0
        if row > start and (total > WINDOW_BYTES or row - start >= WINDOW_IMAGES):
            yield start, row
            start, total = row, size or 0
    yield start, len(sizes)


def _content(content: bytes | Exception) -> bytes | ImageError:
    match content:
        case bytes():
            return content
        case FileNotFoundError():
            return ImageError("fetch", "not found")
        case PermissionError():
            return ImageError("fetch", "permission denied")
        case _:
            return ImageError("fetch", type(content).__name__, str(content))
