import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from fsspec.registry import known_implementations
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from padim_ray.images.fetch import Fetcher
from padim_ray.storage.location import Location
from padim_ray.storage.spelling import ALIASES, PLAIN, canonical_uri
from tests.helpers.web import serve_files

PIECES = ["a", "B", "k.png", "/", "//", "/./", "/../", "/.", "%20", " ", "%2f", "%7E", "~", "ü"]
PIECES += ["%C3%BC", "%", "+", "&", "=", ";", ":", "@", "*", "[", "%5B", "\\", "|", "%41", "-"]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


def is_plain(uri):
    return pc.match_substring_regex(pa.array([uri]), PLAIN)[0].as_py()


def assert_is_canonical(uri):
    assert canonical_uri(uri) == uri
    assert Location.of(uri).uri == uri.rstrip("/")


def assert_plain_is_canonical(uri):
    assert not is_plain(uri) or canonical_uri(uri) == uri


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with serve_files(tmp_path_factory.mktemp("web")) as server:
        yield server


def requests_of(server, uris, options):
    """Fetch URIs one by one, and return the requests that the server got for each."""
    found = []
    for uri in uris:
        server.asked.clear()
        Fetcher(options)([uri])
        found.append(tuple(set(server.asked)))
    return found


HOSTS = ["http://{}", "http://LOCALHOST:{}", "http://localhost:{}"]


@settings(max_examples=60)
@given(uris=st.lists(st.tuples(st.sampled_from(HOSTS), texts), min_size=2, max_size=4))
def test_web_uris_have_one_spelling_if_and_only_if_they_make_the_same_request(web, uris):
    places = [host.format(web.address if host == HOSTS[0] else web.server_port) for host, _ in uris]
    whole = [f"{place}/{text}" for place, (_, text) in zip(places, uris, strict=True)]
    spelled = [canonical_uri(uri) for uri in whole]
    requests = requests_of(web, whole, {})
    assert requests_of(web, spelled, {}) == requests
    assert all(requests)
    for one, its_request in zip(spelled, requests, strict=True):
        assert_plain_is_canonical(one)
        assert canonical_uri(one) == one
        for other, other_request in zip(spelled, requests, strict=True):
            assert (one == other) == (its_request == other_request)


keys = texts.filter(lambda key: key.strip("/"))  # others name the bucket
SCHEMES = ["s3://bucket/", "s3a://bucket/", "s3:///bucket/", "s3a://bucket//"]


@settings(max_examples=60)
@given(uris=st.lists(st.tuples(st.sampled_from(SCHEMES), keys), min_size=2, max_size=4))
def test_s3_uris_have_one_spelling_if_and_only_if_they_name_the_same_key(web, uris):
    options = {"key": "x", "secret": "y", "endpoint_url": f"http://{web.address}"}
    fs = Location.of("s3://bucket", options).fs
    whole = ["".join(parts) for parts in uris]
    spelled = [canonical_uri(uri) for uri in whole]
    for one, its_uri in zip(spelled, whole, strict=True):
        assert fs.split_path(one) == fs.split_path(its_uri)
        assert_plain_is_canonical(its_uri)
        for other, other_uri in zip(spelled, whole, strict=True):
            assert (one == other) == (fs.split_path(its_uri) == fs.split_path(other_uri))


def test_two_slashes_in_a_key_are_asked_for_as_they_are(web):
    options = {"key": "x", "secret": "y", "endpoint_url": f"http://{web.address}"}
    uris = ["s3://b/k", "s3://b//k", "s3a://b/k", "s3://b/%20", "s3://b/ "]
    targets = [target for ((_, target),) in requests_of(web, uris, options)]
    assert targets == ["/b/k", "/b//k", "/b/k", "/b/%2520", "/b/%20"]
    assert len({canonical_uri(uri) for uri in uris}) == len(set(targets))


PREFIXES = ["", "file://", "file://localhost", "local://", "/"]
STEPS = ["/", "//", "/./", "/x/../", "./", "a", "%61"]
below = st.lists(st.sampled_from(STEPS), max_size=5).map("".join)


@settings(max_examples=200)
@given(uris=st.lists(st.tuples(st.sampled_from(PREFIXES), below), min_size=2, max_size=4))
def test_local_paths_have_one_spelling_if_and_only_if_they_are_the_same_file(
    tmp_path_factory, uris
):
    root = tmp_path_factory.getbasetemp() / "spellings"
    for directory in ("x", "a/x", "a/a/x", "%61/x", "aa/x"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    paths = [f"{root}/{path}" for _, path in uris]
    assume(all(map(os.path.exists, paths)))
    spelled = [canonical_uri(f"{prefix}{root}/{path}") for prefix, path in uris]
    for one, its_path in zip(spelled, paths, strict=True):
        assert os.path.samefile(one, its_path)
        assert_plain_is_canonical(one)
        for other, other_path in zip(spelled, paths, strict=True):
            assert (one == other) == os.path.samefile(its_path, other_path)


def test_two_leading_slashes_are_one(tmp_path):
    assert canonical_uri(f"/{tmp_path}/a") == canonical_uri(f"file:///{tmp_path}/a")
    assert_is_canonical(f"{tmp_path}/a")


def test_relative_paths_and_home_become_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in ("a b", "./a b", "x/../a b", "~/a b", f"file://localhost{tmp_path}/a b"):
        assert canonical_uri(text) == f"{tmp_path}/a b"
    assert canonical_uri("file:///a%20b") == "/a%20b"


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("http://Host:80/x", "http://host/x"),
        ("https://Host:443/x", "https://host/x"),
        ("https://host:80/x", "https://host:80/x"),
        ("http://host/x#part", "http://host/x"),
        ("http://host/%7e%2f?sig=%2f%7e+ &b=", "http://host/~%2F?sig=%2f%7e+ &b="),
        ("https://***@host/a.png?sig=***", "https://***@host/a.png?sig=***"),
        ("http://[bad/x", "http://[bad/x"),
        ("http://host:99999/x", "http://host:99999/x"),
        ("http:///x", "http:///x"),
    ],
)
def test_only_host_and_path_of_a_web_uri_are_respelled(uri, canonical):
    assert canonical_uri(uri) == canonical
    assert canonical_uri(canonical) == canonical


@pytest.mark.parametrize(
    ("alias", "name"), [(alias, ALIASES[alias]) for alias in ("s3a", "gcs", "az", "ssh")]
)
def test_names_of_one_file_system_are_one(alias, name):
    kinds = [known_implementations[scheme]["class"] for scheme in (alias, name)]
    assert kinds[0] == kinds[1] or {alias, name} == {"s3a", "s3"}
    assert canonical_uri(f"{alias}://place/a%20/k") == f"{name}://place/a%20/k"
    assert canonical_uri("gcs://b//k/") == "gs://b//k/"


def test_versions_of_an_object_stay_apart():
    for uri in ("s3://b/k?versionId=1", "s3://b/k?versionId=2", "s3://b/k", "s3://b/k/"):
        assert canonical_uri(uri) == uri


def test_the_table_in_the_documentation_is_right():
    page = (Path(__file__).parents[2] / "docs/images.md").read_text()
    rows = re.findall(r"^\| [\w, ]+ \| (`\w*:?/.+) \| (`.+`) \|$", page, re.M)
    assert len(rows) == 4
    for same, different in rows:
        images = [set(map(canonical_uri, re.findall("`(.+?)`", each))) for each in same.split(";")]
        assert [len(spellings) for spellings in images] == [1] * len(images)
        others = re.findall("`(.+?)`", different)
        spelled = set(map(canonical_uri, others)).union(*images)
        assert len(spelled) == len(others) + len(images)
