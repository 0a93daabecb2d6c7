import pytest

from padim_ray.errors import PadimError
from padim_ray.storage.location import Location
from padim_ray.storage.options import options_of

FLAT = {"endpoint_url": "http://minio:9000", "anon": True}
HEADERS = {"headers": {"Authorization": "Bearer x"}}


def test_options_without_a_protocol_go_to_all_but_web_servers():
    for scheme in ("s3", "gs", "abfs", "sftp", "memory"):
        assert options_of(scheme, FLAT) == FLAT
    for scheme in ("http", "https"):
        assert options_of(scheme, FLAT) == {}
        assert options_of(scheme, {"client_kwargs": {"region_name": "eu"}}) == {}


def test_each_protocol_gets_its_own_options():
    options = {"s3a": FLAT, "https": HEADERS}
    assert options_of("s3", options) == FLAT
    assert options_of("https", options) == HEADERS
    assert options_of("http", options) == options_of("gs", options) == {}


@pytest.mark.parametrize(
    ("uri", "options", "message"),
    [
        (
            *("s3://b/x", {"https": HEADERS, **FLAT}),
            r"options of a protocol \(https\) beside options of none \(endpoint_url\): put each "
            'under the name of its protocol, as in {"s3": {"endpoint_url": "…"}}',
        ),
        ("/x", {"s3": FLAT, "anon": True}, r"\(s3\) beside options of none \(anon\)"),
        ("s3://b/x", {"s3": "http://minio:9000"}, "must map names to values for s3"),
        (
            *("https://host/x", HEADERS),
            "has headers without a protocol, which https doesn't get: put it under the protocol's "
            'name, as in {"https": {"headers": "…"}}',
        ),
        ("http://host/x", {"client_kwargs": {"auth": "x"}}, "has auth without a protocol"),
    ],
)
def test_ambiguous_options_are_refused(uri, options, message):
    with pytest.raises(PadimError, match=message):
        Location.of(uri, options)


def test_a_location_passes_all_options_on():
    place = Location.of("s3://b/x", {"s3": {"anon": True}, "https": HEADERS})
    assert Location.of("https://host/x", (place / "y").options).options == place.options
    assert place.fs.anon
