import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.storage.location import (
    Location,
    list_numbers,
    numbered_file,
    safe_segment,
    version_tag,
)


def entries(directory):
    return sorted(entry.name for entry in os.scandir(directory))


def test_a_file_reads_as_it_was_written(place):
    file = place / "new/ü [1] %2F #?.bin"
    assert not file.exists()
    for data in (b"first", b"", bytes(range(256)) * 1000):
        file.write(data)
        assert file.exists()
        assert file.read() == data
    assert (place / "new").exists()
    assert Location.of(file.uri, place.options) == file


def test_a_missing_file_is_not_found(place):
    (place / "directory/file").write(b"x")
    for missing in ("none", "directory/none", "none/file"):
        assert not (place / missing).exists()
        with pytest.raises(FileNotFoundError):
            (place / missing).read()
        with pytest.raises(FileNotFoundError), (place / missing).as_local_file():
            pass


def test_spellings_of_a_location_are_normalised(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in ("a/b", "./a/b/", "a//x/../b", "~/a/b", f"file://{tmp_path}/a/b"):
        assert Location.of(text).uri == f"{tmp_path}/a/b"
    assert Location.of("s3://bucket/a/").uri == "s3://bucket/a"
    assert (Location.of("s3://bucket/") / "a").uri == "s3://bucket/a"
    assert (Location.of("/") / "a").uri == "/a"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s4://x", "'s4://x' has the scheme 's4', which no known file system serves"),
        ("://x", "'://x' has the scheme ''"),
        ("s3://", "'s3://' names no bucket"),
        ("s3:///", "'s3:///' names no bucket"),
        ("gs://bucket/x", "'gs://bucket/x' needs a package that is missing: .*gcsfs"),
    ],
)
def test_uris_without_a_file_system_are_refused(uri, message):
    with pytest.raises(PadimError, match=message):
        Location.of(uri)


def test_a_reader_never_sees_part_of_a_file(tmp_path):
    file = Location.of(str(tmp_path / "file"))
    contents = {bytes([value]) * 3_000_000 for value in range(3)}
    file.write(min(contents))
    done = threading.Event()

    def read():
        seen = set()
        while not done.is_set():
            seen.add(file.read())
        return seen

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for _ in range(20):
            for content in contents:
                file.write(content)
        done.set()
        for reader in readers:
            assert reader.result() <= contents
    assert entries(tmp_path) == ["file"]


def test_of_many_threads_that_create_a_file_one_succeeds(tmp_path):
    file = Location.of(str(tmp_path / "new/claim"))

    def create(number):
        try:
            file.create(f"{number}".encode())
            return number
        except FileExistsError:
            return None

    with ThreadPoolExecutor(16) as pool:
        (winner,) = set(pool.map(create, range(64))) - {None}
    assert file.read() == f"{winner}".encode()
    assert entries(tmp_path / "new") == ["claim"]


def test_a_file_is_created_once(place):
    (place / "file").create(b"first")
    with pytest.raises(FileExistsError):
        (place / "file").create(b"second")
    assert (place / "file").read() == b"first"


def test_a_directory_s_files_are_listed_and_removed(place):
    names = ["a/b[1]*.bin", "a/c", "d"]
    for name in names:
        (place / "x" / name).write(b"")
    assert (place / "x").list_files() == [place / "x" / name for name in names]
    assert (place / "nothing").list_files() == []
    (place / "x").remove_all()
    (place / "nothing").remove_all()
    assert not (place / "x").exists()
    (place / "x/gone").remove()


def test_directories_and_sizes_are_listed(place):
    sizes = {"b/c/1": 3, "b/2": 0, "a [x]/3": 5, "4": 1}
    for name, size in sizes.items():
        (place / "x" / name).write(bytes(size))
    assert (place / "x").list_directories() == ["a [x]", "b"]
    assert (place / "x/b/c").list_directories() == []
    assert (place / "x").file_sizes() == sizes
    assert (place / "nothing").list_directories() == []
    assert (place / "nothing").file_sizes() == {}
    assert (place / "x/a [x]/3").size() == 5
    with pytest.raises(FileNotFoundError):
        (place / "x/5").size()


def test_parts_of_a_file_are_read(place):
    (place / "file").write(bytes(range(256)) * 1000)
    with (place / "file").open_parts() as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == bytes([253, 254, 255])
        file.seek(256 * 500)
        assert file.read(2) == bytes([0, 1])
    with pytest.raises(FileNotFoundError):
        (place / "none").open_parts()


def test_a_table_is_written_as_parquet(place):
    table = pa.table({"uri": ["a", "b"], "score": [0.5, None]})
    (place / "table.parquet").write_table(table)
    with (place / "table.parquet").as_local_file() as path:
        assert pq.read_table(path).equals(table)


def test_numbered_files_are_found_among_others(place):
    for number in (12, 3, 1_000_000):
        numbered_file(place, number).write(b"")
    for name in ("latest.json", "000007.json.tmp", "12.json"):
        (place / name).write(b"")
    assert list_numbers(place) == [3, 12, 1_000_000]
    assert numbered_file(place, 3).name == "000003.json"
    assert list_numbers(place / "nothing") == []


@pytest.mark.parametrize(
    ("info", "tag"),
    [
        ({"ETag": '"abc-2"', "mtime": 1.5}, "abc-2"),
        ({"etag": "0x8D", "size": 3}, "0x8D"),
        ({"mtime": 1700000000.25}, "1700000000.25"),
        ({"size": 3}, None),
    ],
)
def test_a_version_is_told_by_etag_or_modification_time(info, tag):
    assert version_tag(info) == tag


def test_a_write_that_fails_changes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # files to be uploaded are written here
    monkeypatch.setattr("tempfile.tempdir", None)
    file = place / "file"
    file.write(b"old")
    before = entries(tmp_path)
    with pytest.raises(ZeroDivisionError), file.replaced_by() as temporary:
        temporary.write_bytes(b"half of it")
        assert file.read() == b"old"
        raise ZeroDivisionError
    assert file.read() == b"old"
    assert entries(tmp_path) == before
    with pytest.raises(ZeroDivisionError), (place / "new").replaced_by():
        raise ZeroDivisionError
    assert not (place / "new").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_what_the_umask_allows(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        with ThreadPoolExecutor(8) as pool:  # the umask is the process's, not a thread's
            for index in range(200):
                pool.submit(Location.of(str(tmp_path / f"{index}")).write, b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    assert {entry.stat().st_mode & 0o777 for entry in os.scandir(tmp_path)} == {mode}


def test_a_remote_file_is_copied_to_local_disk_and_the_copy_deleted(place):
    (place / "file").write(b"content")
    with (place / "file").as_local_file() as path:
        assert path.read_bytes() == b"content"
        assert (str(path) == f"{place.uri}/file") == place.is_local
    assert path.exists() == place.is_local


def test_a_location_is_sent_with_its_credentials_and_without_its_connection(place):
    (place / "file").write(b"content")
    assert place.exists() and "fs" in vars(place)
    arrived = pickle.loads(pickle.dumps(place))
    assert arrived == place
    assert "fs" not in vars(arrived)
    assert (arrived / "file").read() == b"content"


def test_credentials_are_not_shown(s3):
    place = Location.of("s3://bucket/x", s3.options)
    assert repr(place) == str(place) == "Location(uri='s3://bucket/x')"


NASTY = ["", ".", "..", "../x", "a/b", "%2F", ".hidden", "-rf", " ", "%", "%2E%2E", "x" * 1000]


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY)))
def test_different_texts_make_different_safe_segments(texts):
    segments = {safe_segment(text, without=".png") for text in texts}
    assert len(segments) == len(texts)
    for segment in segments:
        assert segment and segment.isascii() and segment.isprintable()
        assert len(segment) <= 200
        assert segment[0] not in ".- " and not set(segment) & {"/", "\\", ":", "*", "?"}
        assert ".png" not in segment


def test_ordinary_names_stay_as_they_are():
    for text in ("bolt", "line 7", "M4x12_A2-70", "good", "cam(2)", "v1.2+b,c=d@e"):
        assert safe_segment(text) == text
