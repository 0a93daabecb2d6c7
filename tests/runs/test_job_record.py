import json
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.images.manifest import with_long_offsets
from padim_ray.runs.job_record import (
    JOB,
    LISTED,
    NOT_IDENTITY,
    JobRecord,
    describe_changes,
    identify,
)
from padim_ray.runs.options.fit import FitOptions
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.storage.location import Location


def images(uris, **columns):
    columns = {"size": [1, 2, 3], "version_tag": ["x", "y", "z"]} | columns
    return with_long_offsets(pa.table({"uri": uris, **columns}))


IMAGES = images(["/a", "/b", "/c"])


def record(**identity):
    return JobRecord(identity, {"images_per_shard": 64}, IMAGES)


def test_a_record_is_read_as_it_was_written(place):
    assert JobRecord.read(place) is None
    record(alpha=0.1).write(place)
    read = JobRecord.read(place)
    assert (read.identity, read.settings) == ({"alpha": 0.1}, {"images_per_shard": 64})
    assert read.images.equals(IMAGES)


def test_it_says_that_there_is_a_job_when_all_of_it_is_there(place):
    record().write(place)
    (place / JOB).remove()
    assert JobRecord.read(place) is None


@pytest.mark.parametrize("name", [JOB, LISTED])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"identity": 1}', b"\xff", b"[" * 10**5])
def test_a_damaged_record_is_a_sentence(place, name, content):
    record().write(place)
    (place / name).write(content)
    with pytest.raises(PadimError, match=rf"/{name} can't be understood"):
        JobRecord.read(place)


uris = st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 3))


@given(uris, uris)
def test_changes_of_listings_are_counted(before, now):
    def table(images):
        columns = {"uri": list(images), "size": list(images.values())}
        return pa.table(columns, pa.schema({"uri": pa.string(), "size": pa.int64()}))

    described = describe_changes(table(before), table(now))
    counts = {
        "added": len(now.keys() - before.keys()),
        "gone": len(before.keys() - now.keys()),
        "changed": sum(before[uri] != now[uri] for uri in before.keys() & now.keys()),
    }
    if not any(counts.values()):
        assert described is None or before.keys() == now.keys()
    for kind, count in counts.items():
        assert (f"{count} image{'s' * (count != 1)} {kind}" in (described or "")) == (count > 0)


def test_where_images_are_fetched_from_is_neither_written_nor_compared(place):
    presigned = IMAGES.append_column("fetch_uri", pa.array(["/a?sig=1", "/b?sig=1", "/c?sig=1"]))
    JobRecord({}, {}, presigned).write(place)
    read = JobRecord.read(place)
    assert read.images.equals(IMAGES)
    assert read.with_images(presigned, "x holds a run").images.equals(presigned)


def test_what_results_do_not_depend_on_is_not_in_the_identity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = [
        ScoreOptions(images=images, model=model, out="o", **more)
        for images, model, more in (
            ("new/*.png", "m", {}),
            (f"{tmp_path}/new/*.png", "./m", {"actors": 3, "batch_size": 5, "overwrite": True}),
            ("./new//*.png", "m", {"storage_options": {"key": "x"}, "max_failed": 3}),
        )
    ]
    assert identify(same[0]) == identify(same[1]) == identify(same[2])
    fitting = {"images": "x/*.png", "model": "m"}
    assert identify(FitOptions(**fitting)) == identify(FitOptions(**fitting, round_images=7))
    assert identify(FitOptions(**fitting)) != identify(FitOptions(**fitting, seed=7))


def test_identity_leaves_out_only_options_that_exist():
    kinds = (FitOptions, MergeOptions, ScoreOptions)
    assert {field.name for kind in kinds for field in fields(kind)} >= NOT_IDENTITY


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"alpha": 0.2}, "out holds a run with --alpha 0.1, which is 0.2 now: repeat"),
        ({"layers": ["layer1"]}, "with --layers layer1 layer2, which is layer1 now"),
        ({"crop": [64, 64]}, "with --crop not given, which is 64 64 now"),
        ({"model_version": 4}, "with model version 3, which is 4 now"),
    ],
)
def test_another_job_is_told_the_difference(now, message):
    identity = {"alpha": 0.1, "layers": ["layer1", "layer2"], "crop": None, "model_version": 3}
    begun = record(**identity)
    begun.check_identity(identity, "out holds a run")
    with pytest.raises(PadimError, match=message):
        begun.check_identity(identity | now, "out holds a run")
    with pytest.raises(PadimError, match=r"--alpha 0\.1, which is not given now"):
        begun.check_identity({k: v for k, v in identity.items() if k != "alpha"}, "out holds a run")


def test_other_images_are_refused():
    now = images(["/a", "/b", "/d"], size=[1, 7, 3])
    message = (
        r"with other images: since then 1 image added \(/d\), 1 image gone \(/c\), "
        r"1 image changed \(/b\)\. Score"
    )
    with pytest.raises(PadimError, match=message):
        record().with_images(now, "out holds a run")


def test_a_record_that_spells_places_otherwise_is_of_the_same_job(tmp_path):
    places = {"images": "s3a://b/x/{group}/*.png", "masks": "gcs://b/{group}/*.png"}
    places |= {"manifest": "file:///m//x", "model": "s3a://models/a", "models": ["s3a://m/a@1"]}
    (tmp_path / JOB).write_text(json.dumps({"identity": {"job": "x", **places}, "settings": {}}))
    uris = ["s3://b/1", "s3a://b/0", "file:///c"]
    pq.write_table(pa.table({"uri": uris, "size": [1, 2, 3]}), tmp_path / LISTED)
    read = JobRecord.read(Location.of(str(tmp_path)))
    assert read.identity == {
        "job": "x",
        "images": "s3://b/x/{group}/*.png",
        "masks": "gs://b/{group}/*.png",
        "manifest": "/m/x",
        "model": "s3://models/a",
        "models": ["s3://m/a@1"],
    }
    given = pa.table({"uri": ["/c", "s3://b/0", "s3://b/1"], "size": [3, 2, 1]})
    given = with_long_offsets(given.append_column("fetch_uri", pa.array(["c", "0", "1"])))
    continued = read.with_images(given, "x holds a run").images
    assert continued["uri"].to_pylist() == ["s3://b/1", "s3://b/0", "/c"]  # the recorded order
    assert continued["fetch_uri"].to_pylist() == ["1", "0", "c"]


def test_a_record_on_disk_has_ordinary_strings(tmp_path):
    """As those of earlier versions, which can read it."""
    record().write(Location.of(str(tmp_path)))
    assert pq.read_schema(tmp_path / LISTED) == pa.schema(
        {"uri": pa.string(), "size": pa.int64(), "version_tag": pa.string()}
    )


def test_spellings_of_one_place_are_one_identity():
    uris = ("s3://b/x/*.png", "s3a://b/x/*.png", "s3a:///b/x/*.png")
    options = [FitOptions(images=uri, model="m") for uri in uris]
    assert len({str(identify(each)) for each in options}) == 1


def test_credentials_are_not_in_the_identity():
    options = FitOptions(manifest="https://host/m.parquet?X-Amz-Signature=5ecret", model="m")
    assert "5ecret" not in str(identify(options, source="https://ann:5ecret@host/x"))
