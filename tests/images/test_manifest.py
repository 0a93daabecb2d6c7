import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from padim_ray.errors import PadimError
from padim_ray.images.manifest import read_manifest
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.storage.location import Location


def write_parquet(location, **columns):
    with location.replaced_by() as path:
        pq.write_table(pa.table(columns), path)


def test_a_manifest_needs_only_uris(place):
    write_parquet(place / "m.parquet", uri=["/x/b.png", "/x/a.png"])
    table = read_manifest(place / "m.parquet")
    assert table.to_pylist() == [
        {"uri": uri, "group": "default", "size": None, "version_tag": None}
        for uri in ("/x/a.png", "/x/b.png")
    ]
    template = UriTemplate.parse(f"{place.uri}/m.*", place.options)
    assert set(table.schema) == set(list_images(template).schema)


def test_columns_are_kept_and_cast_to_the_listing_s_types(tmp_path):
    location = Location.of(str(tmp_path / "m.parquet"))
    write_parquet(
        location,
        lane=[3, 1, 2],
        uri=pa.array(["/c", "/b", "/a"], pa.large_string()),
        group=pa.array(["y", "x", "y"]).dictionary_encode(),
        size=pa.array([1, 2, None], pa.int32()),
    )
    assert read_manifest(location).select(["lane", "uri", "group", "size"]).to_pylist() == [
        {"lane": 1, "uri": "/b", "group": "x", "size": 2},
        {"lane": 2, "uri": "/a", "group": "y", "size": None},
        {"lane": 3, "uri": "/c", "group": "y", "size": 1},
    ]
    assert read_manifest(location).schema.field("group").type == pa.large_string()


def test_a_local_file_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = Location.of("m.parquet")
    write_parquet(location, uri=["a.png", "file:///b//c.png", "s3://d//e.png"])
    uris = read_manifest(location)["uri"].to_pylist()
    assert uris == ["/b/c.png", f"{tmp_path}/a.png", "s3://d//e.png"]
    write_parquet(location, uri=["a.png", f"{tmp_path}/./a.png"])
    with pytest.raises(PadimError, match="names images more than once"):
        read_manifest(location)
    write_parquet(location, uri=["ftq://a/b.png"])
    with pytest.raises(PadimError, match="'ftq', which no known file system serves"):
        read_manifest(location)


@pytest.mark.parametrize(
    "spellings",
    [
        ("s3://b/k", "s3a://b/k"),
        ("s3://b/k", "s3:///b/k"),
        ("/x/k", "file:///x/k"),
        ("/x/k", "file://localhost/x/y/../k"),
        ("http://host/~ann/k", "http://HOST:80/%7Eann/k"),
    ],
)
def test_one_image_in_two_spellings_is_refused(tmp_path, spellings):
    location = Location.of(str(tmp_path / "m.parquet"))
    write_parquet(location, uri=["s3://b/other", *spellings])
    with pytest.raises(PadimError, match=f"more than once, among them {spellings[0]}. Two spell"):
        read_manifest(location)


def test_images_with_similar_uris_stay_apart(tmp_path):
    location = Location.of(str(tmp_path / "m.parquet"))
    uris = ["s3://b/k", "s3://b//k", "s3://b/k/", "s3://b/%6B", "s3://b/k?versionId=1", "/b/k"]
    write_parquet(location, uri=[*uris, "http://b/k", "https://b/k", "http://b/k?v=1"])
    assert set(uris) < set(read_manifest(location)["uri"].to_pylist())


def test_a_template_and_a_manifest_spell_alike(place, tmp_path):
    (place / "a/1.png").write(b"1")
    alias = f"file://{place.uri}" if place.is_local else place.uri.replace("s3://", "s3a://")
    listed = list_images(UriTemplate.parse(f"{alias}/{{group}}/*.png", place.options))
    manifest = Location.of(str(tmp_path / "m.parquet"))
    write_parquet(manifest, uri=[f"{alias}/a/1.png"], group=["a"])
    uris = [f"{place.uri}/a/1.png"]
    assert listed["uri"].to_pylist() == read_manifest(manifest)["uri"].to_pylist() == uris


def test_results_can_be_a_manifest_again(tmp_path):
    location = Location.of(str(tmp_path / "m.parquet"))
    write_parquet(location, uri=["a"], group=["x"], score=[1.0], status=["scored"], lane=["l"])
    assert read_manifest(location).column_names == ["uri", "group", "lane", "size", "version_tag"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"]}, "The manifest {} has no column 'uri'."),
        ({"uri": pa.array([], pa.string())}, "No image matched: the manifest {} is empty."),
        ({"uri": ["a", None]}, "The manifest {} has a row without a uri or without a group."),
        ({"uri": ["a"], "group": pa.array([None], pa.string())}, "without a group."),
        (
            {"uri": ["/a", "/b", "/a", "s3://c/d"]},
            "The manifest {} names images more than once, among them /a.",
        ),
        ({"uri": ["a"], "size": ["big"]}, "The manifest {} has a column 'size' that is not int64"),
        ({"uri": [["a"]]}, "The manifest {} has a column 'uri' that is not string"),
        ({"uri": ["a", ""]}, "The manifest {} has a row without a uri or without a group."),
        ({"uri": [b"\xff"]}, "The manifest {} has a column 'uri' that is not string"),
    ],
)
def test_unusable_manifests_are_refused(tmp_path, columns, message):
    location = Location.of(str(tmp_path / "m.parquet"))
    write_parquet(location, **columns)
    with pytest.raises(PadimError) as error:
        read_manifest(location)
    assert message.format(location.uri) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"uri\na.png\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(place, data):
    location = place / "m.csv"
    location.write(data)
    with pytest.raises(PadimError, match=r"The manifest \S+m.csv is not a Parquet file: "):
        read_manifest(location)


def test_a_missing_manifest_is_named(place):
    with pytest.raises(PadimError, match=r"There is no manifest at \S+/m.parquet\."):
        read_manifest(place / "m.parquet")
