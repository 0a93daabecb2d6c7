import secrets
import threading
import time

import pytest

from padim_ray.errors import ImageError
from padim_ray.images.fetch import Fetcher, is_unfetched
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.storage.location import Location
from tests.helpers.web import serve_files

NASTY = ["plain.png", "b[1].png", "star*.png", "what?.png", "spa ce.png", "ü%2F.png", "-dash.png"]


@pytest.fixture
def manifest(place):
    for index, name in enumerate(NASTY):
        (place / name).write(bytes([index]) * (index + 1))
    return list_images(UriTemplate.parse(f"{place.uri}/*.png", place.options))


def test_any_name_can_be_fetched(place, manifest):
    uris = [(place / name).uri for name in NASTY]
    assert set(uris) == set(manifest["uri"].to_pylist())
    contents = Fetcher(place.options)([*uris, f"{place.uri}/gone.png"])
    assert contents[:-1] == [bytes([index]) * (index + 1) for index in range(len(NASTY))]
    assert str(contents[-1]) == "fetch: not found"


def columns(manifest):
    return [manifest[name].to_pylist() for name in ("uri", "size", "version_tag")]


def test_an_image_that_changed_since_it_was_listed_fails(place, manifest):
    time.sleep(0.01)
    (place / "plain.png").write(b"!")  # the size stays the same
    uris, sizes, tags = columns(manifest)
    results = dict(zip(uris, Fetcher(place.options)(uris, sizes, tags), strict=True))
    changed = results.pop((place / "plain.png").uri)
    assert str(changed).startswith("fetch: changed since it was listed (")
    assert all(isinstance(content, bytes) for content in results.values())
    again = Fetcher(place.options)([(place / "plain.png").uri], [7], [None])
    assert str(again[0]) == "fetch: changed since it was listed (7 became 1 bytes)"


@pytest.mark.parametrize("sizes_are_known", [True, False])
def test_a_file_that_is_too_large_is_not_read(place, manifest, sizes_are_known):
    uris, sizes, tags = columns(manifest)
    fetch = Fetcher(place.options, max_bytes=3)
    contents = fetch(uris, sizes if sizes_are_known else None, tags)
    for size, content in zip(sizes, contents, strict=True):
        if size <= 3:
            assert len(content) == size
        else:
            limit = f"{size} bytes, more than --max-image-bytes 3"
            assert str(content) == f"fetch: file too large ({limit})"


def test_images_of_several_stores_are_fetched_together(place, tmp_path):
    (place / "a.png").write(b"1")
    local = Location.of(str(tmp_path / "b.png"))
    local.write(b"2")
    assert Fetcher(place.options)([local.uri, (place / "a.png").uri]) == [b"2", b"1"]


@pytest.mark.parametrize("is_per_protocol", [False, True])
def test_options_of_an_object_store_do_not_reach_web_servers(s3, tmp_path, is_per_protocol):
    (tmp_path / "a.png").write_bytes(b"1")
    bucket = Location.of(f"s3://bucket-{secrets.token_hex(4)}", s3.options)
    bucket.fs.mkdir(bucket.path)
    (bucket / "b.png").write(b"2")
    headers = {"X-Token": "open sesame"} if is_per_protocol else {}
    options = {"s3": s3.options, "http": {"headers": headers}} if is_per_protocol else s3.options
    with serve_files(tmp_path, headers) as server:
        uris = [f"http://{server.address}/a.png", (bucket / "b.png").uri]
        assert Fetcher(options)(uris) == [b"1", b"2"]
        assert all(target == "/a.png" for _, target in server.asked)


def test_if_a_store_can_t_be_reached_each_image_fails(monkeypatch):
    monkeypatch.setenv("PADIM_RAY_RETRY_SECONDS", "1")
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "x", "secret": "y"}
    contents = Fetcher(options)(["s3://bucket/a", "s3://bucket/b"])
    for content in contents:
        assert isinstance(content, ImageError)
        assert str(content).startswith("fetch: the storage failed (tried for 1 s: ")


@pytest.fixture
def http(tmp_path):
    with serve_files(tmp_path / "web") as server:
        yield server


@pytest.mark.parametrize("has_lengths", [True, False])
def test_images_are_read_over_http(http, has_lengths):
    http.has_lengths = has_lengths
    uris = [http.put(f"/{index}.png", bytes([index]) * index) for index in range(4)]
    too_large = ImageError("fetch", "file too large")
    contents = Fetcher(max_bytes=2)(uris)
    assert contents[:3] == [b"", b"\1", b"\2\2"]
    assert str(contents[3]).startswith(str(too_large))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((404, "not found"), (410, "not found")),
        *((401, "permission denied"), (403, "permission denied")),
        *((500, "the storage failed"), (503, "the storage failed"), (429, "the storage failed")),
    ],
)
def test_what_an_http_server_refuses_is_told_apart(http, monkeypatch, status, error):
    monkeypatch.setenv("PADIM_RAY_RETRY_SECONDS", "1")
    uris = [http.put("/good.png", b"1"), http.put("/bad.png", b"2")]
    http.refused["/bad.png"] = status
    for sizes in (None, [1, 1]):
        http.asked.clear()
        good, bad = Fetcher()(uris, sizes)
        assert good == b"1"
        assert str(bad).partition(" (")[0] == f"fetch: {error}"
        assert is_unfetched(str(bad)) == (error != "not found")
        is_tried_again = error == "the storage failed"
        assert (http.requests["/bad.png"] > 1) == is_tried_again
        assert http.requests["/good.png"] == 1


def test_a_busy_http_server_is_asked_again(http):
    uri = http.put("/a.png", b"1")
    http.refused["/a.png"] = 503
    threading.Timer(1, http.refused.clear).start()
    assert Fetcher()([uri]) == [b"1"]
    assert http.requests["/a.png"] > 1


def test_an_image_that_changed_on_an_http_server_fails(http):
    uri = http.put("/a.png", b"1")
    (changed,) = Fetcher()([uri], [None], ["other"])
    assert str(changed).startswith("fetch: changed since it was listed (other became ")
    (changed,) = Fetcher()([uri], [2])
    assert str(changed) == "fetch: changed since it was listed (2 became 1 bytes)"


def test_a_directory_is_no_image(tmp_path):
    (content,) = Fetcher()([str(tmp_path)])
    assert str(content) == "fetch: not a file"
    assert not is_unfetched(str(content))
