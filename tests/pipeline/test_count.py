"""Counts of anomaly maps' pixels, compared with counting the arrays."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from padim_ray.evaluation.metrics import PixelCounts
from padim_ray.images.fetch import Fetcher
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.pipeline.stages.columns import fixed_size_column
from padim_ray.pipeline.stages.count import BATCH_MASKS, CountDefectivePixels, CountPixels
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.scoring.histogram import bin_edges

SIDE = 8
MAPPER = AnomalyMapper((SIDE // 2, SIDE // 2), (SIDE, SIDE), sigma=1.0)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_calibration_counts_the_pixels_of_scored_images(is_scored, seed):
    rng = np.random.default_rng(seed)
    distances = rng.gamma(5, 2, (len(is_scored), *MAPPER.patches)).astype(np.float32)
    scores = [float(row) if scored else None for row, scored in enumerate(is_scored)]
    shard = pa.table(
        {
            "shard": [4] * len(scores),
            "group": ["tile"] * len(scores),
            "score": pa.array(scores, pa.float32()),
            "error": [None if scored else "fetch: x (y)" for scored in is_scored],
            "distances": fixed_size_column(distances),
        }
    )
    (row,) = CountPixels(MAPPER)(shard).to_pylist()
    assert (row["shard"], row["group"]) == (4, "tile")
    assert sum(dict(row["causes"]).values()) == is_scored.count(False)
    np.testing.assert_array_equal(
        np.frombuffer(row["scores"], np.float32), np.array(scores, np.float32)
    )
    maps = MAPPER.maps(distances)[is_scored]
    expected, _ = np.histogram(maps, bin_edges())
    np.testing.assert_array_equal(np.frombuffer(row["pixels"], np.int64), expected)


def write_mask(path, mask):
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return str(path)


def test_masks_say_which_pixels_are_defective(tmp_path):
    square = np.zeros((SIDE, SIDE), bool)
    square[1:3, 2:5] = True
    two = square.copy()
    two[6, 6] = True
    blank = np.zeros((SIDE, SIDE), bool)
    (tmp_path / "broken.png").write_bytes(b"<html>")
    broken = str(tmp_path / "broken.png")
    # defect, status, mask, what is counted of it
    images = [
        ("good", "scored", None, blank),
        ("crack", "scored", write_mask(tmp_path / "1.png", square), square),
        ("crack", "scored", write_mask(tmp_path / "2.png", blank), blank),
        ("crack", "scored", None, None),  # nobody knows which pixels are defective
        ("crack", "failed", write_mask(tmp_path / "4.png", square), None),
        ("bent", "scored", broken, None),
        ("good", "scored", None, blank),
        ("good", "scored", write_mask(tmp_path / "7.png", blank), blank),
        ("bent", "scored", write_mask(tmp_path / "8.png", two), two),
    ]
    images *= 1 + BATCH_MASKS // len(images)  # more than one batch
    rng = np.random.default_rng(1)
    maps = rng.gamma(5, 2, (len(images), SIDE, SIDE)).astype(np.float32)
    defects, status, uris, truths = zip(*images, strict=True)
    shard = pa.table({"defect": defects, "status": status, "mask_uri": pa.array(uris, pa.string())})
    count = CountDefectivePixels("good", Preprocessing((SIDE, SIDE)), Fetcher(), 10**6)
    counts = count(shard, maps)

    found = {defect: PixelCounts.from_bytes(data) for defect, data in counts["pixels"]}
    assert found.keys() == {"good", "crack", "bent"}
    for defect, pixels in found.items():
        rows = [r for r, truth in enumerate(truths) if truth is not None and defects[r] == defect]
        truth = np.stack([truths[row] for row in rows])
        for counted, values in (
            (pixels.negatives, maps[rows][~truth]),
            (pixels.positives, maps[rows][truth]),
        ):
            np.testing.assert_array_equal(counted, np.histogram(values, bin_edges())[0])
    repeats = len(images) // 9
    assert (found["crack"].regions, found["bent"].regions) == (repeats, 2 * repeats)
    assert counts["masks"] == 3 * repeats  # of defective images, readable
    assert counts["empty_masks"] == repeats
    ((uri, error),) = counts["unreadable_masks"]
    assert uri == broken and error.startswith("mask: not a PNG")


def test_masks_are_read_from_where_their_credentials_allow(tmp_path):
    mask = np.eye(SIDE, dtype=bool)
    real = write_mask(tmp_path / "mask.png", mask)
    shard = pa.table(
        {
            "defect": ["crack"],
            "status": ["scored"],
            "mask_uri": ["https://store/mask.png?***"],
            "fetch_mask_uri": [real],
        }
    )
    count = CountDefectivePixels("good", Preprocessing((SIDE, SIDE)), Fetcher(), 10**6)
    counts = count(shard, np.ones((1, SIDE, SIDE), np.float32))
    ((_, data),) = counts["pixels"]
    assert PixelCounts.from_bytes(data).positives.sum() == SIDE
    assert counts["masks"] == 1 and not counts["unreadable_masks"]
