"""Files made from images and groups of any name lie below the output directory."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from padim_ray.model.layout import shard_location
from padim_ray.scoring.heatmap import output_name
from padim_ray.storage.location import Location, safe_segment

PARTS = ["..", ".", "", "/", "\\", "%2F", "%2e%2e", "\0", "\n", "\r\n", "~", "C:", "://", "?", "#"]
PARTS += [
    "/etc/passwd",
    "..\\..\\x",
    "file://",
    "é" * 500,
    "x" * 1000,
    " ",
    "-rf",
    "*",
    "\u202e",
    "a",
]
NAME = st.lists(st.sampled_from(PARTS) | st.text(st.characters(codec="utf-8"), max_size=5)).map(
    "".join
)
OUT = "/out/run"


def assert_below(path, directory):
    assert os.path.normpath(path) == path and path.startswith(f"{directory}/")
    assert path.isprintable() and "\\" not in path and "://" not in path.removeprefix("s3://")
    assert all(len(segment.encode()) <= 255 for segment in path.split("/"))


@given(NAME, st.sampled_from(["", "/data", "s3://bucket", "/", "/data/../.."]), st.booleans())
@example("../" * 20 + "etc/passwd", "/data", True)
@example("/" * 50 + "etc/passwd", "", True)
@example("..\\..\\x", "s3://bucket", False)
def test_files_made_from_an_image_lie_below_their_directory(name, prefix, is_below):
    uri = f"{prefix}/{name}" if is_below else name
    for directory, suffix in (("heatmaps", ".png"), ("maps", ".tiff")):
        location = Location.of(OUT) / f"{directory}/{output_name(uri, prefix, suffix)}"
        assert_below(location.uri, f"{OUT}/{directory}")


@given(NAME)
def test_files_made_from_a_group_lie_below_their_directory(group):
    shard = shard_location(Location.of(OUT), 1, group, "moments", 0, 1)
    assert_below(shard.uri, f"{OUT}/versions/000001/groups")
    assert shard.uri.count("/") == OUT.count("/") + 5
    assert_below(f"{OUT}/curves/{safe_segment(group)}.png", f"{OUT}/curves")


@pytest.mark.parametrize("part", PARTS)
def test_files_made_from_any_name_can_be_written(part, tmp_path):
    location = (
        Location.of(str(tmp_path)) / f"heatmaps/{output_name(f'/data/{part}', '/data', '.png')}"
    )
    location.write(b"drawn")
    (written,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert written.read_bytes() == b"drawn"
