"""The pixel counts that the driver of an evaluation keeps."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from padim_ray.evaluation.metrics import PixelCounts
from padim_ray.pipeline.jobs.evaluate import _Truth

IMAGES_PER_SHARD = 64


@pytest.fixture(scope="module")
def counted():
    """A shard's counts, as a task returns them."""
    rng = np.random.default_rng(0)
    maps = rng.gamma(9, 2, (4, 64, 64)).astype(np.float32)
    pixels = {
        "good": PixelCounts.of(maps, np.zeros(maps.shape, bool)).to_bytes(),
        "crack": PixelCounts.of(maps, rng.random(maps.shape) > 0.9).to_bytes(),
    }
    return {"pixels": list(pixels.items()), "masks": 9, "empty_masks": 1, "unreadable_masks": []}


def add_shards(counted, images):
    """Add this many images; return the driver's peak memory in bytes, and its counts."""
    manifest = pa.table({"group": ["tile"] * images, "defect": ["good"] * images})
    truth = _Truth(manifest, "good")
    tracemalloc.start()
    try:
        for start in range(0, images, IMAGES_PER_SHARD):
            truth.add(slice(start, start + IMAGES_PER_SHARD), counted)
        return tracemalloc.get_traced_memory()[1], truth
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_images_need_no_more_memory_than_a_thousand(counted):
    few, truth = add_shards(counted, 1_024)
    many, more = add_shards(counted, 102_400)
    assert many < 1.5 * few  # although there are 100 times as many shards
    assert more.masks["tile"].empty_masks == 100 * truth.masks["tile"].empty_masks == 1600
    for key, counts in truth.pixels.items():
        np.testing.assert_array_equal(more.pixels[key].negatives, 100 * counts.negatives)
        assert more.pixels[key].regions == 100 * counts.regions
