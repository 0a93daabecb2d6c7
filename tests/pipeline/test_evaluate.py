"""What the driver keeps of an evaluation."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from padim_ray.evaluation.metrics import PixelCounts
from padim_ray.pipeline.jobs.evaluate import _Truth

IMAGES_PER_SHARD = 64


@pytest.fixture(scope="module")
def counted():
    """What a task counts in a shard."""
    rng = np.random.default_rng(0)
    maps = rng.gamma(9, 2, (4, 64, 64)).astype(np.float32)
    pixels = {
        "good": PixelCounts.of(maps, np.zeros(maps.shape, bool)).to_bytes(),
        "crack": PixelCounts.of(maps, rng.random(maps.shape) > 0.9).to_bytes(),
    }
    return {"pixels": list(pixels.items()), "masks": 9, "empty_masks": 1, "unreadable_masks": []}


def take_shards(counted, images):
    """The driver's peak memory over so many images, in bytes, and what it has counted."""
    manifest = pa.table({"group": ["tile"] * images, "defect": ["good"] * images})
    truth = _Truth(manifest, "good")
    tracemalloc.start()
    try:
        for start in range(0, images, IMAGES_PER_SHARD):
            truth.take(slice(start, start + IMAGES_PER_SHARD), counted)
        return tracemalloc.get_traced_memory()[1], truth
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_images_need_no_more_memory_than_a_thousand(counted):
    few, truth = take_shards(counted, 1_024)
    many, more = take_shards(counted, 102_400)
    assert many < 1.5 * few  # 100 times the shards: what is kept of each would show
    assert more.masks["tile"].empty_masks == 100 * truth.masks["tile"].empty_masks == 1600
    for key, counts in truth.pixels.items():
        np.testing.assert_array_equal(more.pixels[key].negatives, 100 * counts.negatives)
        assert more.pixels[key].regions == 100 * counts.regions
