"""Drawing a shard's heatmaps: the files, and their URIs in the results."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from padim_ray.images.fetch import Fetcher
from padim_ray.pipeline.stages.commit import WriteResults, read_committed
from padim_ray.pipeline.stages.draw import DrawHeatmaps
from padim_ray.pipeline.stages.output import read_parquet
from padim_ray.runs import run_directory
from padim_ray.scoring.heatmap import draw_heatmap
from tests.pipeline.test_commit import DECISIONS, MAPPER, SIDE, VERSION, output_in, scored_shard

PREPROCESSING, SCALES = VERSION.spec.preprocessing, {"bolt": (1.0, 12.0)}
FETCH = Fetcher()


@pytest.fixture
def wanted(tmp_path):
    """Rows 1 and 3 of shard 7, whose images are here; and the first one's pixels."""
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, 2 * SIDE, 3), np.uint8)
    sources = [str(tmp_path / f"{row}.png") for row in (1, 3)]
    for source in sources:
        Image.fromarray(photo).save(source)
    rows = pa.table(
        {
            "group": ["bolt"] * 2,
            "shard": [7] * 2,
            "row": pa.array([1, 3], pa.int32()),
            "source": sources,
        }
    )
    return rows, photo


def drawing(output, fetch=FETCH):
    return DrawHeatmaps(output, MAPPER, PREPROCESSING, SCALES, fetch, 10**6)


def test_chosen_images_get_heatmaps_unless_they_are_gone(tmp_path, wanted):
    output = output_in(tmp_path, "all")
    WriteResults(output, VERSION, DECISIONS)(scored_shard([2, 9, 4, 20]))
    before = read_parquet(output.part(7))
    rows, photo = wanted
    (tmp_path / "3.png").unlink()
    for _ in range(2):  # Ray may run a task twice
        assert drawing(output)(rows).to_pylist() == [{"shard": 7, "drawn": 1}]

    results = read_parquet(output.part(7))
    uri = f"{tmp_path}/heatmaps/bolt/1.png.png"
    assert results["heatmap_uri"].to_pylist() == [None, uri, None, None]
    others = [name for name in before.column_names if name != "heatmap_uri"]
    assert results.select(others).equals(before.select(others))
    (committed,) = read_committed(output, with_counts=False)
    assert committed.is_drawn and output.is_own(committed.attempt)
    anomaly_map = np.ones((SIDE, SIDE), np.float32)
    anomaly_map[2:4, 5:7] = 9
    expected = draw_heatmap(photo, anomaly_map, PREPROCESSING, SCALES["bolt"])
    with Image.open(uri) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_a_write_task_that_was_cut_off_and_goes_on_leaves_the_heatmaps_in_the_results(
    place, wanted
):
    output, shard = output_in(place, "all"), scored_shard([2, 9, 4, 20])
    write = WriteResults(output, VERSION, DECISIONS, lambda shard, maps: {"masks": 0})
    drawn = []

    def be_cut_off(shard, maps):
        """The task was repeated elsewhere, and heatmaps were drawn, when it goes on."""
        write(shard)
        drawing(output)(wanted[0])
        drawn.append(output.part(7).read())
        return {"masks": 0}

    WriteResults(output, VERSION, DECISIONS, be_cut_off)(shard)
    assert [output.part(7).read()] == drawn
    assert read_parquet(output.part(7))["heatmap_uri"].null_count == 2
    run_directory.complete(place)
    WriteResults(output, VERSION, DECISIONS)(shard)
    assert [output.part(7).read()] == drawn


def test_a_drawing_task_leaves_a_part_alone_that_was_scored_again_meanwhile(tmp_path, wanted):
    output = output_in(tmp_path, "all")
    write = WriteResults(output, VERSION, DECISIONS)
    write(scored_shard([2, 9, None, 20]))

    def fetch_slowly(sources):
        output.part(7).remove()  # the run is continued, because an image couldn't be fetched
        write(scored_shard([2, 9, 4, 20]))
        return Fetcher()(sources)

    with pytest.raises(RuntimeError, match=r"part-000007.parquet was replaced while"):
        drawing(output, fetch_slowly)(wanted[0])
    assert read_parquet(output.part(7))["score"].to_pylist() == [2, 9, 4, 20]
