"""A run's files: names, formats, and what is listed."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.pipeline.stages.output import (
    Output,
    encode_image,
    one_row,
    read_parquet,
    write_all,
)
from padim_ray.storage.location import Location


def output_in(directory, heatmaps="anomalous", *, maps=False):
    return Output(
        root=Location.of(str(directory)),
        prefix="s3://lines",
        heatmaps=heatmaps,
        top=3,
        staged_top=1,
        maps=maps,
        min_region_area=0,
    )


def test_files_are_named_after_shards_and_images(tmp_path):
    output = output_in(tmp_path)
    for location, name in (
        (output.part(7), "results/part-000007.parquet"),
        (output.staged(7, "a-b"), ".staging/distances-000007-a-b.parquet"),
        (output.counts(1234567, "a-b"), ".staging/counts-1234567-a-b.parquet"),
        (output.heatmap("s3://lines/7/a.png"), "heatmaps/7/a.png.png"),
        (output.map("s3://lines/7/a.png"), "maps/7/a.png.tiff"),
    ):
        assert location.uri == f"{tmp_path}/{name}"


@pytest.mark.parametrize(
    ("heatmaps", "maps", "names"),
    [
        ("none", False, {"results", "report.html"}),
        ("all", False, {"results", "report.html", "heatmaps"}),
        ("none", True, {"results", "report.html", "maps"}),
    ],
)
def test_places_are_those_that_are_written(tmp_path, heatmaps, maps, names):
    places = output_in(tmp_path, heatmaps, maps=maps).places()
    assert places == {name: f"{tmp_path}/{name}" for name in names}


def test_a_part_that_the_driver_does_not_see_is_an_error(tmp_path):
    output = output_in(tmp_path)
    for shard in (0, 2):
        output.part(shard).write_table(pa.table({"uri": ["a"]}))
    output.check_complete(2)
    with pytest.raises(PadimError, match=r"holds 2 of the 3 parts .* storage that all nodes share"):
        output.check_complete(3)


def test_rows_have_the_same_types_whether_they_are_empty_or_not(tmp_path):
    empty = {"causes": [], "pixels": [], "unreadable_masks": [], "loaded_groups": []}
    filled = {
        "causes": [("decode: empty file", 2)],
        "pixels": [("good", b"\x00"), ("crack", b"")],
        "unreadable_masks": [("m.png", "mask: not a PNG")],
        "loaded_groups": ["a", "b"],
    }
    assert one_row(empty).schema == one_row(filled).schema
    output = output_in(tmp_path)
    output.counts(3, "a").write_table(one_row(filled | {"masks": 5}))
    assert read_parquet(output.counts(3, "a")).to_pylist() == [filled | {"masks": 5}]


def test_files_are_written_losslessly(tmp_path):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (5, 7, 3), np.uint8)
    anomaly_map = rng.random((5, 7), np.float32)
    root = Location.of(str(tmp_path))
    write_all(
        [
            (root / "a/photo.png", encode_image(Image.fromarray(photo), "PNG")),
            (root / "b/map.tiff", encode_image(Image.fromarray(anomaly_map), "TIFF")),
        ]
    )
    for name, array in (("a/photo.png", photo), ("b/map.tiff", anomaly_map)):
        with Image.open(io.BytesIO((root / name).read())) as image:
            np.testing.assert_array_equal(np.asarray(image), array)


def test_writing_many_files_raises_the_first_error(tmp_path):
    root = Location.of(str(tmp_path))
    (root / "file").write(json.dumps(1).encode())
    with pytest.raises((PadimError, OSError)):
        write_all([(root / "file/below", b"x"), (root / "other", b"y")])
