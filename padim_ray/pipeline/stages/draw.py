"""The drawing stage: heatmaps of chosen images, once all scores are known."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import ImageError
from padim_ray.images.decode_in_child import UprightImage, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.stages.columns import column_array
from padim_ray.pipeline.stages.output import (
    ATTEMPT,
    DRAWN,
    Output,
    attempt_of,
    encode_image,
    read_parquet,
    write_all,
)
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.scoring.heatmap import draw_heatmap

BATCH_IMAGES = 16  # in memory at their full size


class DrawHeatmaps:
    """The stage that draws a shard's heatmaps and writes their URIs into the shard's part.

    It is given the rows to draw as `Scores.by_shard` makes them, and returns one row with the
    columns `shard` and `drawn` (number of heatmaps). Ray may run a task twice: it writes the same
    again. Only this stage replaces a part, and only one that is still of the attempt that it read.

    Args:
        output: the run's files.
        mapper: makes anomaly maps of distances.
        preprocessing: the model's.
        scales: both ends of the colour scale by group.
        fetch: reads the images.
        max_pixels: larger images get no heatmap.
    """

    def __init__(
        self,
        output: Output,
        mapper: AnomalyMapper,
        preprocessing: Preprocessing,
        scales: Mapping[str, tuple[float, float]],
        fetch: Fetcher,
        max_pixels: int,
    ) -> None:
        self.output, self.mapper, self.scales = output, mapper, scales
        self.preprocessing, self.fetch = preprocessing, fetch
        self.wanted = UprightImage(max_pixels, grey_range=preprocessing.grey_range)

    def __call__(self, wanted: pa.Table) -> pa.Table:
        with stage("draw", wanted.num_rows):
            return self._draw_shard(wanted)

    def _draw_shard(self, wanted: pa.Table) -> pa.Table:
        number, scale = wanted["shard"][0].as_py(), self.scales[wanted["group"][0].as_py()]
        part = self.output.part(number)
        attempt = attempt_of(read_parquet(part).schema)
        assert attempt is not None  # the driver has other parts scored again
        staged = read_parquet(self.output.staged(number, attempt))
        staged = staged.filter(pc.is_in(staged["row"], wanted["row"].combine_chunks()))
        sources = dict(zip(wanted["row"].to_pylist(), wanted["source"].to_pylist(), strict=True))
        drawn: dict[int, str] = {}
        for start in range(0, staged.num_rows, BATCH_IMAGES):
            drawn.update(self._draw(staged.slice(start, BATCH_IMAGES), sources, scale))
        results = read_parquet(part)
        if attempt_of(results.schema) != attempt:
            raise RuntimeError(f"{part.uri} was replaced while its heatmaps were drawn")
        uris = [drawn.get(row) for row in range(results.num_rows)]
        index = results.column_names.index("heatmap_uri")
        named = results.set_column(index, "heatmap_uri", pa.array(uris, pa.string()))
        part.write_table(named.replace_schema_metadata({ATTEMPT: attempt, DRAWN: b""}))
        return pa.table({"shard": [number], "drawn": [len(drawn)]})

    def _draw(
        self, staged: pa.Table, sources: Mapping[int, str], scale: tuple[float, float]
    ) -> dict[int, str]:
        """Draw and write heatmaps; return their URIs by row."""
        uris, rows = staged["uri"].to_pylist(), staged["row"].to_pylist()
        maps = self.mapper.maps(column_array(staged["distances"], np.float32, self.mapper.patches))
        images = decode_all(self.fetch([sources[row] for row in rows]), self.wanted)
        drawn, files = {}, []
        for row, uri, anomaly_map, image in zip(rows, uris, maps, images, strict=True):
            if isinstance(image, ImageError):
                continue  # deleted or replaced since it was scored
            heatmap = draw_heatmap(image.pixels, anomaly_map, self.preprocessing, scale)
            location = self.output.heatmap(uri)
            files.append((location, encode_image(heatmap, "PNG")))
            drawn[row] = location.uri
        write_all(files)
        return drawn
