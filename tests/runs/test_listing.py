import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.runs.listing import check_images_option, read_images_table
from padim_ray.runs.options.common import JobOptions


def options(**chosen):
    return JobOptions(model="m", **chosen)


def files(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return [str(root / name) for name in names]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["nut/1.png"], "1 images listed in 1 group"),
        (["nut/1.png", "bolt/2.png", "bolt/1.png"], "3 images listed in 2 groups"),
    ],
)
def test_a_template_and_a_manifest_give_the_same_images(tmp_path, caplog, names, line):
    uris = files(tmp_path, names)
    manifest = tmp_path / "manifest.parquet"
    groups = [name.partition("/")[0] for name in names]
    pq.write_table(pa.table({"uri": uris, "group": groups}), manifest)
    with caplog.at_level(logging.INFO, "padim_ray"):
        listed = read_images_table(options(images=f"{tmp_path}/{{group}}/*.png"))
        read = read_images_table(options(manifest=str(manifest)))
    expected = sorted(zip(groups, uris, strict=True))
    for table in (listed, read):
        columns = [table[name].to_pylist() for name in ("group", "uri")]
        assert list(zip(*columns, strict=True)) == expected
    assert [record.message for record in caplog.records] == [line, line]


def test_presigned_uris_are_fetched_but_not_shown(tmp_path):
    secret = "https://host/b.png?X-Amz-Signature=5ecret"
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"uri": [secret, "https://host/a.png"]}), manifest)
    table = read_images_table(options(manifest=str(manifest)))
    assert "5ecret" not in str(table.drop_columns(["fetch_uri"]).to_pydict())
    assert table["uri"].to_pylist()[0] == "https://host/a.png"
    assert table["fetch_uri"].to_pylist() == ["https://host/a.png", secret]


@given(st.permutations([f"s3://b/{number}.png" for number in range(6)]), st.integers(0, 63))
def test_any_order_of_a_manifest_gives_one_order(tmp_path_factory, uris, mask):
    manifest = tmp_path_factory.mktemp("listing") / "manifest.parquet"
    groups = ["bolt" if mask >> int(uri[7]) & 1 else "nut" for uri in uris]
    pq.write_table(pa.table({"uri": uris, "group": groups}), manifest)
    table = read_images_table(options(manifest=str(manifest)))
    columns = [table[name].to_pylist() for name in ("group", "uri")]
    assert list(zip(*columns, strict=True)) == sorted(zip(groups, uris, strict=True))


def test_a_malformed_template_is_refused_without_listing():
    for images in ("s3://nowhere/{group/*.png", "s3://nowhere/{score}/*.png"):
        with pytest.raises(PadimError):
            check_images_option(options(images=images))
    check_images_option(options(images="s3://nowhere/{group}/*.png"))
    check_images_option(options(manifest="s3://nowhere/x.parquet"))
