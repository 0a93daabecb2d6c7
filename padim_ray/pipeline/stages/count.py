"""Tasks that count anomaly maps' pixels, in histograms that add up over shards."""

from typing import Any

import numpy as np
import pyarrow as pa

from padim_ray.errors import ImageError
from padim_ray.evaluation.metrics import PixelCounts
from padim_ray.images.decode_in_child import Mask, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.sources import uris_to_fetch
from padim_ray.pipeline.stages.columns import column_array
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.scoring.histogram import count_values

MASKS_TOGETHER = 16


class CountPixels:
    """Scored rows of a shard in; one row out, with its scores and a histogram of its maps."""

    def __init__(self, mapper: AnomalyMapper) -> None:
        self.mapper = mapper

    def __call__(self, shard: pa.Table) -> pa.Table:
        scores = np.array(shard["score"].to_pylist(), np.float32)  # None becomes NaN
        distances = column_array(shard["distances"], np.float32, self.mapper.patches)
        maps = self.mapper.maps(distances[np.isfinite(scores)])
        return pa.table(
            {
                "shard": [shard["shard"][0].as_py()],
                "group": [shard["group"][0].as_py()],
                "scores": [scores.tobytes()],
                "pixels": [count_values(maps).astype(np.int64).tobytes()],
            }
        )


class CountDefectivePixels:
    """Counts a shard's pixels by the truth that masks tell, for each defect apart.

    Args:
        normal: the defect that means a good image, which needs no mask.
        preprocessing: the model's.
        fetch: reads the masks.
        max_pixels: larger masks are unreadable.
    """

    def __init__(
        self, normal: str, preprocessing: Preprocessing, fetch: Fetcher, max_pixels: int
    ) -> None:
        self.normal, self.fetch = normal, fetch
        self.wanted = Mask(preprocessing, max_pixels)

    def __call__(self, shard: pa.Table, maps: np.ndarray) -> dict[str, Any]:
        """Rows of one group with `defect`, `mask_uri` and `status`, and their maps (n, h, w)."""
        counts: dict[str, PixelCounts] = {}
        unreadable: dict[str, str] = {}
        read = empty = 0
        # a few at a time: the masks at hand are of the original images' size
        for start in range(0, shard.num_rows, MASKS_TOGETHER):
            part = shard.slice(start, MASKS_TOGETHER)
            masks = self._masks(part, unreadable)
            defects = part["defect"].to_pylist()
            for defect in set(defects):
                rows = [row for row in masks if defects[row] == defect]
                if not rows:
                    continue
                truth = np.stack([masks[row] for row in rows])
                if defect != self.normal:
                    read += len(rows)
                    empty += int((~truth.any((1, 2))).sum())
                added = PixelCounts.of(maps[start:][rows], truth)
                counts[defect] = counts.get(defect, PixelCounts.empty()) + added
        return {
            "pixels": [(defect, count.to_bytes()) for defect, count in counts.items()],
            "masks": read,
            "empty_masks": empty,
            "unreadable_masks": list(unreadable.items()),
        }

    def _masks(self, images: pa.Table, unreadable: dict[str, str]) -> dict[int, np.ndarray]:
        """By row, the masks of scored images whose pixels' truth is known."""
        rows = range(images.num_rows)
        uris = dict(zip(rows, images["mask_uri"].to_pylist(), strict=True))
        scored = [row for row in rows if images["status"][row].as_py() == "scored"]
        given = [row for row in scored if uris[row] is not None]
        nothing = np.zeros(self.wanted.preprocessing.size, bool)
        masks = {
            row: nothing
            for row in scored
            if uris[row] is None and images["defect"][row].as_py() == self.normal
        }
        sources = uris_to_fetch(images, "mask_uri")
        contents = self.fetch([sources[row] for row in given])
        for row, mask in zip(given, decode_all(contents, self.wanted), strict=True):
            if isinstance(mask, ImageError):
                unreadable[uris[row]] = str(mask)
            else:
                masks[row] = mask.pixels
        return masks
