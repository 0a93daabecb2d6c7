import pyarrow as pa
import pytest

from padim_ray import PadimError
from padim_ray.images.sources import hide_credentials, uris_to_fetch, without_sources

PLAIN = ["s3://bucket/a@b.png", "/data/x=1.png", "http://host/a.png?width=2"]
SIGNED = ["https://host/a.png?sig=abc", "https://ann:pa55@host/b.png", "s3://bucket/c.png"]
REDACTED = ["https://host/a.png?sig=***", "https://***@host/b.png", "s3://bucket/c.png"]


def test_a_manifest_without_credentials_stays_as_it_is():
    manifest = pa.table({"uri": PLAIN, "group": ["a", "b", "c"]})
    assert hide_credentials(manifest) is manifest
    assert uris_to_fetch(manifest) == PLAIN
    assert without_sources(manifest).equals(manifest)


def test_complete_uris_are_kept_beside_redacted_ones():
    manifest = hide_credentials(pa.table({"uri": SIGNED, "group": ["a", "b", "c"]}))
    assert manifest["uri"].to_pylist() == REDACTED
    assert uris_to_fetch(manifest) == SIGNED
    assert uris_to_fetch(manifest.slice(1, 1)) == SIGNED[1:2]
    assert without_sources(manifest).to_pydict() == {"uri": REDACTED, "group": ["a", "b", "c"]}


def test_uris_of_masks_are_redacted_separately():
    manifest = pa.table({"uri": PLAIN[:2], "mask_uri": pa.array([SIGNED[0], None])})
    manifest = hide_credentials(hide_credentials(manifest), "mask_uri")
    assert manifest["mask_uri"].to_pylist() == [REDACTED[0], None]
    assert uris_to_fetch(manifest) == PLAIN[:2]
    assert uris_to_fetch(manifest, "mask_uri") == [SIGNED[0], None]
    assert without_sources(manifest).column_names == ["uri", "mask_uri"]


def test_images_whose_uris_differ_only_in_credentials_are_refused():
    manifest = pa.table({"uri": ["https://host/a.png?sig=abc", "https://host/a.png?sig=def"]})
    with pytest.raises(PadimError, match="differ only in what looks like credentials") as error:
        hide_credentials(manifest)
    assert "abc" not in str(error.value)


def test_an_image_with_credentials_whose_redacted_uri_is_listed_too_is_refused():
    manifest = pa.table({"uri": ["https://host/a.png?sig=***", "https://host/a.png?sig=def"]})
    with pytest.raises(PadimError, match=r"such as https://host/a.png\?sig=\*\*\*"):
        hide_credentials(manifest)
