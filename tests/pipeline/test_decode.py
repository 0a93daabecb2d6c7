"""Fetching and decoding a shard, and arrays as columns."""

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from padim_ray.images.fetch import Fetcher
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.pipeline.stages.columns import column_array, fixed_size_column
from padim_ray.pipeline.stages.decode import WINDOW_IMAGES, FetchAndDecode
from padim_ray.storage.location import Location

NASTY = ["plain.png", "b[1].png", "star*.png", "what?.png", "spa ce.png", "ü%2F.png", "-dash.png"]


def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (20, 10), shade).save(buffer, "PNG")
    return buffer.getvalue()


def test_any_name_can_be_fetched(place):
    for shade, name in enumerate(NASTY):
        (place / name).write(png(shade))
    uris = [(place / name).uri for name in NASTY]
    contents = Fetcher(place.options)([*uris, f"{place.uri}/gone.png"])
    assert contents[:-1] == [png(shade) for shade in range(len(NASTY))]
    assert str(contents[-1]) == "fetch: not found"


def test_images_of_several_stores_are_fetched_together(place, tmp_path):
    (place / "a.png").write(png(1))
    local = Location.of(str(tmp_path / "b.png"))
    local.write(png(2))
    assert Fetcher(place.options)([local.uri, (place / "a.png").uri]) == [png(2), png(1)]


@pytest.mark.parametrize("is_listed", [False, True])
def test_rows_keep_their_order_over_many_windows(place, is_listed):
    count = WINDOW_IMAGES + 5
    rows: Mapping[str, list] = {"uri": [], "size": [], "version_tag": [None] * count}
    for shade in range(count):
        file = place / f"{shade:03d}.png"
        content = b"broken" if shade % 7 == 3 else png(shade)
        file.write(content)
        rows["uri"].append(file.uri)
        rows["size"].append(len(content) if is_listed else None)
    shard = pa.table(
        rows,
        schema=pa.schema({"uri": pa.string(), "size": pa.int64(), "version_tag": pa.string()}),
    )
    decoded = FetchAndDecode(Preprocessing((16, 32), (16, 16)), Fetcher(place.options))(shard)
    pixels = column_array(decoded["image"], np.uint8, (16, 16, 3))
    for shade, error in enumerate(decoded["error"].to_pylist()):
        if shade % 7 == 3:
            assert error.startswith("decode: not a PNG")
            assert decoded["width"][shade].as_py() is None
        else:
            assert error is None
            assert (pixels[shade] == shade).all()
            assert decoded["width"][shade].as_py() == 20


@given(st.integers(1, 6), st.integers(0, 8), st.data())
def test_slices_of_chunked_columns_equal_slices_of_the_arrays(chunks, start, data):
    arrays = [
        np.random.default_rng(i).random((data.draw(st.integers(1, 4)), 2, 3), np.float32)
        for i in range(chunks)
    ]
    column = pa.chunked_array([fixed_size_column(array) for array in arrays])
    whole = np.concatenate(arrays)
    part = slice(start, start + data.draw(st.integers(0, 9)))
    sliced = column.slice(part.start, max(0, part.stop - part.start))
    np.testing.assert_array_equal(column_array(sliced, np.float32, (2, 3)), whole[part])
