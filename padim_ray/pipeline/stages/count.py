"""Stages that count the pixels of anomaly maps in histograms, which add up over shards."""

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
from padim_ray.runs.failures import count_causes
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.scoring.histogram import count_values

BATCH_MASKS = 16  # in memory at the size of the original images


class CountPixels:
    """Calibration's last stage: a shard's scored rows in, scores and a histogram of its maps out.

    Args:
        mapper: makes anomaly maps of distances.
    """

    def __init__(self, mapper: AnomalyMapper) -> None:
        self.mapper = mapper

    def __call__(self, shard: pa.Table) -> pa.Table:
        scores = np.array(shard["score"].to_pylist(), np.float32)  # None becomes NaN
        distances = column_array(shard["distances"], np.float32, self.mapper.patches)
        maps = self.mapper.maps(distances[np.isfinite(scores)])
        causes = count_causes(shard["error"].to_pylist())
        return pa.table(
            {
                "shard": [shard["shard"][0].as_py()],
                "group": [shard["group"][0].as_py()],
                "scores": [scores.tobytes()],
                "pixels": [count_values(maps).astype(np.int64).tobytes()],
                "causes": pa.array([list(causes.items())], pa.map_(pa.string(), pa.int64())),
            }
        )


class CountDefectivePixels:
    """Counts a shard's defective and normal pixels by their value in the anomaly maps.

    Args:
        normal: value of `defect` that marks a good image, which needs no mask.
        preprocessing: the model's.
        fetch: reads the masks.
        max_pixels: larger masks count as unreadable.
    """

    def __init__(
        self, normal: str, preprocessing: Preprocessing, fetch: Fetcher, max_pixels: int
    ) -> None:
        self.normal, self.fetch = normal, fetch
        self.wanted = Mask(preprocessing, max_pixels)

    def __call__(self, shard: pa.Table, maps: np.ndarray) -> dict[str, Any]:
        """Count the pixels of one shard.

        Args:
            shard: rows of one group, with `defect`, `mask_uri` and `status`.
            maps: their anomaly maps (n, h, w).

        Returns:
            `pixels`: pairs of a defect and its encoded `PixelCounts`. `masks`: number of defective
            images with a mask. `empty_masks`: number of these masks that mark no pixel.
            `unreadable_masks`: pairs of a mask's URI and its error.
        """
        counts: dict[str, PixelCounts] = {}
        unreadable: dict[str, str] = {}
        read = empty = 0
        for start in range(0, shard.num_rows, BATCH_MASKS):
            part = shard.slice(start, BATCH_MASKS)
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
        """Masks (h, w) of scored images by row; rows whose truth is unknown are left out."""
        masks: dict[int, np.ndarray] = {}
        sources: dict[int, str] = {}
        no_defect = np.zeros(self.wanted.preprocessing.size, bool)
        columns = (images["status"].to_pylist(), images["defect"].to_pylist())
        for row, (status, defect, source) in enumerate(
            zip(*columns, uris_to_fetch(images, "mask_uri"), strict=True)
        ):
            if status != "scored":
                continue
            if source is not None:
                sources[row] = source
            elif defect == self.normal:
                masks[row] = no_defect
        contents = self.fetch(list(sources.values()))
        for row, mask in zip(sources, decode_all(contents, self.wanted), strict=True):
            if isinstance(mask, ImageError):
                unreadable[images["mask_uri"][row].as_py()] = str(mask)
            else:
                masks[row] = mask.pixels
        return masks
