import glob
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.storage.location import Location


def write_files(place, *names):
    for name in names:
        (place / name).write(name.encode())


def listed(place, pattern):
    return list_images(UriTemplate.parse(f"{place.uri}/{pattern}", place.options))


def names(place, pattern):
    """Matched paths below a place, in order."""
    return [uri.removeprefix(f"{place.uri}/") for uri in listed(place, pattern)["uri"].to_pylist()]


def rows(table, *columns):
    return [tuple(row.values()) for row in table.select(columns).to_pylist()]


def test_whole_segments_are_captured(place):
    write_files(place, "nut/crack/7.png", "bolt/good/1.png", "bolt/good/0.png", "bolt/readme.txt")
    table = listed(place, "{group}/{defect}/*.png")
    assert rows(table, "uri", "group", "defect", "size") == [
        (f"{place.uri}/bolt/good/0.png", "bolt", "good", 15),
        (f"{place.uri}/bolt/good/1.png", "bolt", "good", 15),
        (f"{place.uri}/nut/crack/7.png", "nut", "crack", 15),
    ]
    assert table.column_names == ["uri", "group", "defect", "size", "version_tag"]


def test_parts_of_segments_are_captured(place):
    write_files(place, "l1-a.png", "l2-b-c.png", "l3.png", "-d.png")
    table = listed(place, "{lane}-{name}.png")
    assert rows(table, "lane", "name", "group") == [
        ("l1", "a", "default"),
        ("l2", "b-c", "default"),  # the shortest lane that fits
    ]


def test_a_name_that_is_used_twice_stands_for_the_same_text(place):
    write_files(place, "a/a.png", "a/b.png", "b/b-b.png", "a-b/a-b-1.png", "a-b/a-b.png")
    assert names(place, "{lane}/{lane}.png") == ["a-b/a-b.png", "a/a.png"]
    assert names(place, "*/{x}-{x}.png") == ["b/b-b.png"]
    # the file's part is the directory's name, not the shortest text that fits
    table = listed(place, "{lane}/{lane}-{number}.png")
    assert rows(table, "lane", "number") == [("a-b", "1"), ("b", "b")]


def test_a_new_version_has_another_tag(place):
    write_files(place, "a.png")
    before = listed(place, "*.png")["version_tag"][0].as_py()
    assert before and listed(place, "*.png")["version_tag"][0].as_py() == before
    (place / "a.png").write(b"something else")
    assert listed(place, "*.png")["version_tag"][0].as_py() != before


AWKWARD = [
    "a b.png",
    "ü 漢.png",
    "x%2Fy.png",
    'it\'s "it".png',
    "a+b&c=d#e?f.png",
    "q[1].png",
    "$HOME;~.png",
    "{1}.png",
]


def test_awkward_names_are_kept(place):
    write_files(place, *(f"sp ace/{name}" for name in AWKWARD))
    table = listed(place, "{folder}/{name}.png")
    assert table["uri"].to_pylist() == sorted(f"{place.uri}/sp ace/{name}" for name in AWKWARD)
    assert sorted(table["name"].to_pylist()) == sorted(name[:-4] for name in AWKWARD)
    for uri in table["uri"].to_pylist():
        name = uri.removeprefix(f"{place.uri}/")
        assert Location.of(uri, place.options).read() == name.encode()


def test_wildcards_are_a_shells(place):
    write_files(
        place, "a1.png", "a22.png", "b1.png", ".a1.png", "c/a1.png", "c/d/a1.png", "c/.d/a1.png"
    )
    assert names(place, "?1.png") == ["a1.png", "b1.png"]
    assert names(place, "[!b]*.png") == ["a1.png", "a22.png"]
    assert names(place, "[^b]?.png") == ["a1.png"]
    assert names(place, "*/*.png") == ["c/a1.png"]
    assert names(place, "**/a1.png") == ["a1.png", "c/a1.png", "c/d/a1.png"]
    assert names(place, "c/**") == ["c/a1.png", "c/d/a1.png"]
    assert names(place, "**/.d/{name}.png") == ["c/.d/a1.png"]
    assert names(place, ".{name}.png") == [".a1.png"]
    assert names(place, "c/a1.png") == ["c/a1.png"]


def test_a_file_is_not_its_own_child(place):
    write_files(place, "bolt/a.png", "nut")
    assert names(place, "{group}/*") == ["bolt/a.png"]
    with pytest.raises(PadimError, match=r"nothing in \S+/nut fits"):
        names(place, "nut/*")


SEGMENTS = ["a", "b", "ab", "a.b", ".a", "b-1", "a b", "[a]", "a]", "!", "^a", "ä", "\\", "**a"]


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> Path:
    """Two hundred files under similar names, up to four deep."""
    root = tmp_path_factory.mktemp("forest")
    rng = np.random.default_rng(0)
    for _ in range(200):
        file = root.joinpath(*rng.choice(SEGMENTS, rng.integers(1, 5)))
        if not any(part.is_file() for part in file.parents) and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
    return root


PIECES = ["*", "?", "a", "b", ".", "-", "[ab]", "[!a]", "[a-c]", "[]a]", "[!]]", "[[]", "[\\]", "["]
PATTERNS = st.lists(
    st.just("**") | st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    min_size=1,
    max_size=4,
).filter(lambda segments: not {".", ".."} & set(segments))


@settings(max_examples=400)
@given(pattern=PATTERNS.map("/".join))
def test_a_pattern_matches_what_pythons_glob_matches(forest, pattern):
    expected = {
        file
        for file in glob.glob(f"{glob.escape(str(forest))}/{pattern}", recursive=True)
        if os.path.isfile(file)
    }
    try:
        found = list_images(UriTemplate.parse(f"{forest}/{pattern}"))["uri"].to_pylist()
    except PadimError:
        found = []
    assert found == sorted(os.path.normpath(file) for file in expected)


def test_links_on_local_disk_are_followed(tmp_path):
    write_files(Location.of(str(tmp_path)), "real/a.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/b.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "real/broken.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "real/loop.png").symlink_to(tmp_path / "real/loop.png")
    place = Location.of(str(tmp_path))
    assert names(place, "{group}/*.png") == [
        f"{group}/{name}.png" for group, name in itertools.product(["linked", "real"], "ab")
    ]
    # `**` doesn't follow links to directories, which may form loops
    assert names(place, "**/*.png") == ["real/a.png", "real/b.png"]
    assert listed(place, "real/*")["size"].to_pylist() == [10, 10]


def test_local_paths_are_relative_as_in_a_shell(tmp_path, monkeypatch):
    write_files(Location.of(str(tmp_path)), "x/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "x")
    for text in ("*.png", "./*.png", "../x/*.png", "~/x/*.png", f"file://{tmp_path}/x/*.png"):
        assert list_images(UriTemplate.parse(text))["uri"].to_pylist() == [f"{tmp_path}/x/a.png"]


def test_the_root_directory_can_be_matched(tmp_path):
    first = tmp_path.parts[1]
    template = UriTemplate.parse("/" + "/".join([f"{first[:-1]}?", *tmp_path.parts[2:], "*.png"]))
    write_files(Location.of(str(tmp_path)), "a.png")
    assert list_images(template)["uri"].to_pylist() == [f"{tmp_path}/a.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/x/{lane/*.png", "'/x/{lane/*.png' has a brace without its partner"),
        ("/x/lane}/*.png", "brace without its partner"),
        ("/x/{{lane}}/*.png", "brace without its partner"),
        ("/x/{}/*.png", "{} in '/x/{}/*.png' is not a name: use letters, digits and _"),
        ("/x/{a-b}/*.png", "{a-b} in '/x/{a-b}/*.png' is not a name"),
        ("/x/{score}/*.png", "{score} in '/x/{score}/*.png' is a column of the results: use an"),
        ("s3://{bucket}/*.png", "The bucket in 's3://{bucket}/*.png' must be named, not captured"),
        ("s3://*/a.png", "The bucket in 's3://*/a.png' must be named"),
        ("s3:///*.png", "The bucket in 's3:///*.png' must be named"),
        ("s3://bucket", "'s3://bucket' names a directory; end it with a pattern such as /*.png"),
        ("s3://bucket/x/", "'s3://bucket/x/' names a directory; end it with a pattern"),
        ("/x/y/", "'/x/y/' names a directory; end it with a pattern such as /*.png"),
        ("ftpx://x/*.png", "'ftpx://x' has the scheme 'ftpx', which no known file system serves"),
    ],
)
def test_malformed_templates_are_refused(text, message):
    with pytest.raises(PadimError) as error:
        UriTemplate.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{group}/*.bmp", "No image matched: nothing in {}/bolt and 1 more like it fits '*.bmp'."),
        (
            "*/x/{group}/*",
            "No group matched: nothing in {}/bolt/x and 1 more like it fits '{group}",
        ),
        ("bolt/{group}/*", "No group matched: nothing in {}/bolt fits '{group}'."),
        ("lid/{group}/*", "No group matched: nothing in {}/lid fits '{group}'."),
        ("b*/{x}/*", "No directory or image matched: nothing in {}/bolt fits '{x}'."),
        ("**/*.bmp", "No image matched: nothing in {} fits '**/*.bmp'."),
        ("*", "No image matched: in {}, only directories fit '*'; end it with a pattern such as"),
        ("{group}", "No image matched: in {}, only directories fit '{group}'; end it with a pat"),
        ("bolt", "No image matched: in {}, only directories fit 'bolt'; end it with a pattern su"),
    ],
)
def test_an_error_names_the_part_that_matches_nothing(place, pattern, message):
    write_files(place, "bolt/a.png", "nut/a.png")
    with pytest.raises(PadimError) as error:
        listed(place, pattern)
    assert str(error.value).startswith(message.replace("{}", place.uri))


@pytest.mark.parametrize("pattern", ["*.png", "x/**/*.png", "{group}/a.png", "a.png"])
def test_a_missing_bucket_is_named(s3, pattern):
    with pytest.raises(PadimError, match=r"Can't list s3://nowhere\S*: the bucket does not exist"):
        list_images(UriTemplate.parse(f"s3://nowhere/{pattern}", s3.options))


@pytest.mark.parametrize("pattern", ["*.png", "**/*.png"])
def test_wrong_credentials_are_an_error_and_not_an_empty_archive(s3, pattern):
    template = UriTemplate.parse(f"s3://x/{pattern}", {**s3.options, "secret": "0" * 40})
    with pytest.raises(PadimError, match="Can't list s3://x: the storage refuses these creden"):
        list_images(template)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(PadimError, match=r"The name '\S+udcff.png' is not UTF-8; rename it"):
        listed(Location.of(str(tmp_path)), "*.png")
