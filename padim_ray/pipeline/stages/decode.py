"""The stage that fetches and decodes images: a shard of the manifest in, its pixels out."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from padim_ray.errors import ImageError
from padim_ray.images.decode_in_child import HUNG_AFTER, ModelInput, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.limits import MAX_IMAGE_PIXELS
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.sources import uris_to_fetch
from padim_ray.pipeline.cluster.prometheus import count_stage
from padim_ray.pipeline.stages.columns import fixed_size_column
from padim_ray.runs.options.common import RunOptions

WINDOW_BYTES = 64 * 2**20
"""Bytes of encoded images that are fetched together, while the window before is decoded."""
WINDOW_IMAGES = 64


class FetchAndDecode:
    """Appends columns `image` (H·W·3 bytes), `status`, `error`, `width` and `height` to a shard.

    The row of an image that can't be fetched or decoded has the status "failed".

    Args:
        preprocessing: the model's.
        fetch: reads the images.
        max_pixels: images with more pixels fail.
        hung_after: seconds after which the decoding of an image is given up.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        fetch: Fetcher,
        max_pixels: int = MAX_IMAGE_PIXELS,
        hung_after: float = HUNG_AFTER,
    ) -> None:
        self.wanted = ModelInput(preprocessing, max_pixels)
        self.fetch, self.hung_after = fetch, hung_after
        self._waited = 0.0  # seconds that this call waited for the store

    def __call__(self, shard: pa.Table) -> pa.Table:
        started, self._waited = time.perf_counter(), 0.0
        decoded = self._decode(shard)
        count_stage("fetch", shard.num_rows, self._waited)
        seconds = time.perf_counter() - started - self._waited
        count_stage("decode", shard.num_rows, seconds)
        return decoded

    def _decode(self, shard: pa.Table) -> pa.Table:
        height, width = self.wanted.preprocessing.size
        pixels = np.zeros((shard.num_rows, height, width, 3), np.uint8)
        errors: list[str | None] = []
        sizes: list[tuple[int, int] | tuple[None, None]] = []
        decoded = decode_all(self._fetch(shard), self.wanted, self.hung_after, pixels)
        for image in decoded:
            if isinstance(image, ImageError):
                errors.append(str(image))
                sizes.append((None, None))
            else:
                errors.append(None)
                sizes.append((image.width, image.height))
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
        """Yield the rows' encoded images in order; the next window is fetched during decoding."""
        uris = uris_to_fetch(shard)
        sizes, tags = (shard[name].to_pylist() for name in ("size", "version_tag"))
        windows = list(_windows(sizes))
        with ThreadPoolExecutor(1) as pool:

            def start_fetching(window: slice) -> Future[list[bytes | ImageError]]:
                return pool.submit(self.fetch, uris[window], sizes[window], tags[window])

            ahead = start_fetching(windows[0])
            for following in [*windows[1:], None]:
                asked = time.perf_counter()
                contents = ahead.result()
                self._waited += time.perf_counter() - asked
                if following:
                    ahead = start_fetching(following)
                yield from contents


def _windows(sizes: Sequence[int | None]) -> Iterator[slice]:
    """Cut rows into windows of at most `WINDOW_IMAGES` images and about `WINDOW_BYTES`."""
    start, total = 0, 0
    for row, size in enumerate(sizes):
        total += size or 0
        if row > start and (total > WINDOW_BYTES or row - start >= WINDOW_IMAGES):
            yield slice(start, row)
            start, total = row, size or 0
    yield slice(start, len(sizes))


def fetcher(options: RunOptions) -> Fetcher:
    """Make a fetcher with a run's storage options and limits."""
    return Fetcher(options.storage_options or {}, options.max_image_bytes)
