import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.storage.location import Location, safe_segment


def entries(directory):
    return sorted(entry.name for entry in os.scandir(directory))


def test_what_is_written_is_read(place):
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


def test_users_may_write_a_place_in_several_ways(tmp_path, monkeypatch):
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
def test_uris_that_lead_nowhere_are_refused(uri, message):
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


def test_of_many_who_create_a_file_on_disk_one_succeeds(tmp_path):
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


def test_files_are_listed_and_removed_together(place):
    names = ["a/b[1]*.bin", "a/c", "d"]
    for name in names:
        (place / "x" / name).write(b"")
    assert (place / "x").list_files() == [place / "x" / name for name in names]
    assert (place / "nothing").list_files() == []
    (place / "x").remove_all()
    (place / "nothing").remove_all()
    assert not (place / "x").exists()
    (place / "x/gone").remove()


def test_a_write_that_fails_changes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where copies on their way to a store are
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


def test_a_local_file_is_itself_and_a_remote_one_a_passing_copy(place):
    (place / "file").write(b"content")
    with (place / "file").as_local_file() as path:
        assert path.read_bytes() == b"content"
        assert (str(path) == f"{place.uri}/file") == place.is_local
    assert path.exists() == place.is_local


def test_a_place_travels_to_a_worker_with_its_credentials_but_not_its_connection(place):
    (place / "file").write(b"content")
    assert place.exists() and "fs" in vars(place)
    arrived = pickle.loads(pickle.dumps(place))
    assert arrived == place
    assert "fs" not in vars(arrived)
    assert (arrived / "file").read() == b"content"


def test_credentials_are_not_shown(s3):
    place = Location.of("s3://bucket/x", s3.options)
    assert repr(place) == str(place) == "Location(uri='s3://bucket/x')"


def refusals(location):
    """The messages of everything that one can try with a location."""

    def copy():
        with location.as_local_file():
            pass

    tries = {
        "read": [location.read, copy],
        "write": [lambda: location.write(b"x")],
    }
    for action, functions in tries.items():
        for function in functions:
            with pytest.raises(PadimError) as error:
                function()
            message = str(error.value)
            start = f"Can't {action} {location.uri}"
            assert message.startswith(f"{start}: ")
            assert message.endswith(".") and "\n" not in message
            yield message.split(": ", 1)[1]


CLOSED = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"secret": "0" * 40}, "the storage refuses these credentials ("),
        ({"key": "AKIA0000000000000000"}, "the storage refuses these credentials ("),
        (CLOSED, "the storage can't be reached ("),
        ({"endpoint_url": "minio:9000"}, "Invalid endpoint: minio:9000 (see --storage-options)."),
        ({"endpoint": "http://minio"}, "AioSession"),
    ],
)
def test_what_keeps_a_store_away_is_said(s3, changed, reason, monkeypatch):
    monkeypatch.setenv("PADIM_RAY_RETRY_SECONDS", "1")
    location = Location.of("s3://bucket/file", {**s3.options, **changed})
    assert all(message.startswith(reason) for message in refusals(location))
    with pytest.raises(PadimError, match="Can't look up s3://bucket/file: "):
        location.exists()


def test_a_missing_bucket_is_named(s3):
    missing = set(refusals(Location.of("s3://nowhere/file", s3.options)))
    assert missing == {"the bucket does not exist."}
    for message in refusals(Location.of("s3://no bucket/file", s3.options)):
        assert "Invalid bucket name" in message


def test_missing_credentials_are_asked_for(s3, monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    location = Location.of("s3://bucket/file", {"endpoint_url": s3.endpoint})
    with pytest.raises(PadimError, match=r"no credentials were found .* --storage-options"):
        location.read()


def test_local_directories_that_take_no_file_are_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    below_a_file = Location.of(str(tmp_path / "file/below/it"))
    assert set(refusals(below_a_file)) == {"Not a directory."}
    for target, reason in [
        (tmp_path / "file/below", "a file is where a directory should be"),
        (tmp_path, "Is a directory"),
        ("/proc/padim-ray/file", "No such file or directory"),
    ]:
        with pytest.raises(PadimError, match=f"^Can't write {target}: {reason}.$"):
            Location.of(str(target)).write(b"")
    with pytest.raises(PadimError, match=f"Can't read {tmp_path}: Is a directory."):
        Location.of(str(tmp_path)).read()


NASTY = ["", ".", "..", "../x", "a/b", "%2F", ".hidden", "-rf", " ", "%", "%2E%2E", "x" * 1000]


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY)))
def test_any_text_makes_one_safe_segment(texts):
    segments = {safe_segment(text, without=".png") for text in texts}
    assert len(segments) == len(texts)
    for segment in segments:
        assert segment and segment.isascii() and segment.isprintable()
        assert len(segment) <= 200
        assert segment[0] not in ".- " and not set(segment) & {"/", "\\", ":", "*", "?"}
        assert ".png" not in segment


def test_ordinary_segments_are_themselves():
    for text in ("bolt", "line 7", "M4x12_A2-70", "good", "cam(2)", "v1.2+b,c=d@e"):
        assert safe_segment(text) == text
