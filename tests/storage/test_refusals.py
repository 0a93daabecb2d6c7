import os

import pytest

from padim_ray.errors import PadimError
from padim_ray.storage.location import Location


def refusals(location):
    """Try to read and write a location, and yield the reasons why that fails."""

    def copy():
        with location.as_local_file():
            pass

    def write():
        location.write(b"x")

    for action, function in (("read", location.read), ("read", copy), ("write", write)):
        with pytest.raises(PadimError) as error:
            function()
        message = str(error.value)
        assert message.startswith(f"Can't {action} {location.uri}: ")
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
def test_an_error_says_why_a_store_refuses(s3, changed, reason, monkeypatch):
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


def test_an_error_says_why_a_local_file_can_t_be_written(tmp_path):
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
