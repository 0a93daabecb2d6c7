"""Drawing a shard's heatmaps: the files, and their URIs in the results."""

import numpy as np
import pyarrow as pa
from PIL import Image

from padim_ray.images.fetch import Fetcher
from padim_ray.pipeline.stages.commit import WriteResults, read_committed
from padim_ray.pipeline.stages.draw import DrawHeatmaps
from padim_ray.pipeline.stages.output import read_parquet
from padim_ray.scoring.heatmap import draw_heatmap
from tests.pipeline.test_commit import DECISIONS, MAPPER, SIDE, VERSION, output_in, scored_shard


def test_chosen_images_get_heatmaps_unless_they_are_gone(tmp_path):
    output = output_in(tmp_path, "all")
    shard = scored_shard([2, 9, 4, 20])
    WriteResults(output, VERSION, DECISIONS)(shard)
    before = read_parquet(output.part(7))
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, 2 * SIDE, 3), np.uint8)
    sources = [str(tmp_path / f"{row}.png") for row in (1, 3)]
    Image.fromarray(photo).save(sources[0])  # the other one is gone
    preprocessing, scales = VERSION.spec.preprocessing, {"bolt": (1.0, 12.0)}
    draw = DrawHeatmaps(output, MAPPER, preprocessing, scales, Fetcher(), 10**6)
    wanted = pa.table(
        {
            "group": ["bolt"] * 2,
            "shard": [7] * 2,
            "row": pa.array([1, 3], pa.int32()),
            "source": sources,
        }
    )
    for _ in range(2):  # Ray may run a task twice
        assert draw(wanted).to_pylist() == [{"shard": 7, "drawn": 1}]

    results = read_parquet(output.part(7))
    uri = f"{tmp_path}/heatmaps/bolt/1.png.png"
    assert results["heatmap_uri"].to_pylist() == [None, uri, None, None]
    others = [name for name in before.column_names if name != "heatmap_uri"]
    assert results.select(others).equals(before.select(others))
    (committed,) = read_committed(output, with_counts=False)
    assert committed.is_drawn
    anomaly_map = np.ones((SIDE, SIDE), np.float32)
    anomaly_map[2:4, 5:7] = 9
    expected = draw_heatmap(photo, anomaly_map, preprocessing, scales["bolt"])
    with Image.open(uri) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))
