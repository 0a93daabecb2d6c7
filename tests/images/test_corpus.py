"""The corpus through the jobs' stage, from local disk; awkward file names also from S3."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from padim_ray.images import decode_in_child
from padim_ray.images.fetch import Fetcher
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.pipeline.stages.columns import column_array
from padim_ray.pipeline.stages.decode import FetchAndDecode
from padim_ray.storage.fail_points import VARIABLE
from tests.helpers.conversions import COLORS, HEIGHT, WIDTH
from tests.helpers.corpus import NAMES, kinds, table
from tests.helpers.encoders import png


def fetch_and_decode(uris, storage_options=None, **settings):
    """Pixels (images, HEIGHT, WIDTH, 3) and errors."""
    stage = FetchAndDecode(
        Preprocessing((HEIGHT, WIDTH)), Fetcher(storage_options or {}), **settings
    )
    count = len(uris)
    schema = pa.schema({"uri": pa.string(), "size": pa.int64(), "version_tag": pa.string()})
    rows = {"uri": uris, "size": [None] * count, "version_tag": [None] * count}
    decoded = stage(pa.table(rows, schema=schema))
    assert decoded["uri"].to_pylist() == uris
    pixels = column_array(decoded["image"], np.uint8, (HEIGHT, WIDTH, 3))
    return pixels, decoded["error"].to_pylist()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Pixels and errors of each kind's files, by kind. All files are in one shard."""
    directory = tmp_path_factory.mktemp("corpus")
    uris = []
    for kind in kinds():
        for content in kind.files:
            uris.append(str(directory / f"{len(uris)}.jpg"))
            Path(uris[-1]).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "decoder")
        patch.setattr(decode_in_child, "_idle", [])  # idle children lack the variable
        pixels, errors = fetch_and_decode(uris, hung_after=3)
    stops = np.cumsum([len(kind.files) for kind in kinds()])[:-1]
    split = zip(np.split(pixels, stops), np.split(np.array(errors), stops), strict=True)
    return {kind.name: outcome for kind, outcome in zip(kinds(), split, strict=True)}


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_every_kind_of_image_has_its_outcome(kind, outcomes):
    pixels, errors = outcomes[kind.name]
    if kind.fails:
        for error in errors:
            assert error.startswith(tuple(kind.outcome.split(" or ")))
        assert not pixels.any()
    else:
        assert list(errors) == [None] * len(kind.files)
        expected = kind.pixels if kind.pixels.ndim == 3 else kind.pixels[..., None]
        assert np.abs(pixels - expected.astype(float)).max() <= kind.tolerance


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_file_name_can_be_read(name, place):
    uri = (place / name).uri
    if "://" in uri:
        place.fs.pipe({(place / name).path: png(COLORS)})
    else:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        Path(uri).write_bytes(png(COLORS))
    pixels, errors = fetch_and_decode([uri], place.options)
    assert errors == [None]
    np.testing.assert_array_equal(pixels[0], COLORS)


def test_the_documentation_has_the_corpus_s_table():
    page = Path(__file__).parents[2] / "docs/images.md"
    assert table() in page.read_text()
