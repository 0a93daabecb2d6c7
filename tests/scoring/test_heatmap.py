import os
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.scoring.heatmap import (
    MAX_SIDE,
    MIN_SIDE,
    color_scale,
    common_prefix,
    draw_heatmap,
    output_name,
)

WHOLE = Preprocessing((64, 64))
CROPPED = Preprocessing((64, 96), (32, 64))
LETTERBOX = Preprocessing((64, 64), letterbox=True)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def black(height, width):
    return np.zeros((height, width, 3), np.uint8)


def peak_map(size, y, x):
    """A hill of height 10 around (y, x), over zero."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return 10 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18)


@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_heatmaps_keep_the_aspect_ratio_within_a_screens_size(height, width):
    assume(max(height, width) <= 60 * min(height, width))
    heatmap = draw_heatmap(black(height, width), np.ones((64, 64)), WHOLE, (2, 3))
    assert max(heatmap.size) <= MAX_SIDE
    # images between the limits keep their size
    if min(height, width) >= MIN_SIDE and max(height, width) <= MAX_SIDE:
        assert heatmap.size == (width, height)
    else:
        assert min(heatmap.size) == MIN_SIDE or max(heatmap.size) == MAX_SIDE
    factor = max(heatmap.size) / max(height, width)
    np.testing.assert_allclose(heatmap.size, (width * factor, height * factor), atol=1)


@pytest.mark.parametrize("size", [(300, 400), (2000, 1000), (40, 30), (1, 5000), (5000, 1), (1, 1)])
@pytest.mark.parametrize("preprocessing", [WHOLE, CROPPED])
def test_below_the_scale_the_image_is_unchanged(size, preprocessing):
    image = noise(*size)
    cold = np.full(preprocessing.size, 4.0)
    heatmap = draw_heatmap(image, cold, preprocessing, (4.0, 5.0))
    expected = Image.fromarray(image).resize(heatmap.size, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(heatmap), np.asarray(expected))


@pytest.mark.parametrize("size", [(300, 400), (1500, 700), (90, 120)])
@pytest.mark.parametrize("preprocessing", [WHOLE, CROPPED, LETTERBOX])
@settings(max_examples=20)
@given(share=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)))
def test_the_hottest_place_is_the_maps_peak(size, preprocessing, share):
    height, width = preprocessing.size
    place = preprocessing.placement(*size)
    rows, columns = place.inside((height, width))
    y = rows.start + share[0] * (rows.stop - rows.start - 1)
    x = columns.start + share[1] * (columns.stop - columns.start - 1)
    scale = (0.0, 10.0)
    heatmap = draw_heatmap(black(*size), peak_map((height, width), y, x), preprocessing, scale)
    brightness = np.asarray(heatmap).sum(2)
    hottest = np.argwhere(brightness > 0.98 * brightness.max()).mean(0)
    # from the model's pixel (y, x) to the resized image, then to the heatmap
    down, across = heatmap.height / place.height, heatmap.width / place.width
    expected = (y - place.top + 0.5) * down, (x - place.left + 0.5) * across
    pixel = max(down, across)  # the size of a model's pixel
    np.testing.assert_allclose(hottest + 0.5, expected, atol=0.75 * pixel)


def test_outside_the_crop_nothing_is_drawn():
    image = noise(640, 960)
    heatmap = np.asarray(draw_heatmap(image, np.full((32, 64), 9.0), CROPPED, (0.0, 1.0)))
    changed = (heatmap != image).any(2)
    assert changed[160:480, 160:800].mean() > 0.99
    changed[160:480, 160:800] = False
    assert not changed.any()


@given(value=st.floats(0.1, 10), low=st.floats(0, 5), width=st.floats(0.1, 5))
def test_one_scale_gives_equal_colours_to_equal_distances(value, low, width):
    scale = (low, low + width)
    small, large = np.zeros((64, 64)), np.full((64, 64), 20.0)
    small[16:48, 16:48] = large[16:48, 16:48] = value
    colors = {
        tuple(np.asarray(draw_heatmap(black(*size), values, WHOLE, scale))[size[0] // 2, 150])
        for values in (small, large)
        for size in ((300, 300), (600, 300))
    }
    assert len(colors) == 1


def test_more_distance_is_more_heat():
    ramp = np.tile(np.linspace(0, 10, 64), (64, 1))
    heatmap = np.asarray(draw_heatmap(black(512, 512), ramp, WHOLE, (2.0, 8.0)))
    brightness = heatmap[256].astype(float).sum(1)
    assert (np.diff(brightness) >= -3).all()  # rounding in three channels
    assert (brightness[:90] == 0).all() and brightness[90:420].std() > 0


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200))
def test_the_scale_is_ordered_and_within_reach_of_the_scores(scores):
    low, high = color_scale(np.array(scores, np.float32))
    assert low < high
    assert np.float32(low) < np.float32(high)  # the map is float32
    assert min(scores) * (1 - 1e-6) <= low <= max(scores) * (1 + 1e-6)
    assert high <= max(max(scores), low * 1.25, low + 1e-6) * (1 + 1e-6)


@pytest.mark.parametrize("score", [0.0, 1e-3, 7.5, 1e6])
@pytest.mark.parametrize("count", [1, 50])
def test_equal_scores_make_no_heat_below_them(score, count):
    low, high = color_scale(np.full(count, score))
    assert low == score and high > low


def test_the_scale_ends_above_the_threshold():
    """In a run without defects, the highest of the good images doesn't look like one."""
    scores = np.random.default_rng(0).uniform(10, 20, 1000)
    assert color_scale(scores, 25.0)[1] == 37.5
    assert color_scale(np.append(scores, [90] * 100), 25.0)[1] == 90


def test_extreme_scores_do_not_stretch_the_scale():
    scores = np.random.default_rng(0).uniform(10, 20, 1000)
    assert np.allclose(color_scale(scores), color_scale(np.append(scores, [1e9])), rtol=0.01)


@pytest.mark.parametrize(
    ("uri", "prefix", "name"),
    [
        ("/data/test/crack/000.png", "/data", "test/crack/000.png.png"),
        ("/data/test/crack/000.png", "/", "data/test/crack/000.png.png"),
        ("s3://archive/bolt/7 a.jpeg", "s3://archive", "bolt/7 a.jpeg.png"),
        ("s3://archive/bolt/ü.jpg", "s3://archive/bolt", "%C3%BC.jpg.png"),
        ("/data/../x.png", "/data", "%2E./x.png.png"),
        ("/data/a.png/b", "/data", "a%2E%70%6E%67/b.png"),
        ("s3://archive//a", "s3://archive", "%/a.png"),
    ],
)
def test_names_follow_the_images(uri, prefix, name):
    assert output_name(uri, prefix, ".png") == name


NASTY = ["", ".", "..", "a", "a.png", "a.png.png", ".png", "%2E%2E", "%", "é", "e\u0301", "a."]
NASTY += ["..png", "a ", " a", "-a", "a\n", "\0", "~", "x" * 199, "x" * 1000, "x" * 999 + "y"]
NASTY += ["é" * 100, ".png" * 50, "x.png" * 40, "a%2E%70%6E%67", "A", "a\\b", "C:"]
SEGMENT = st.sampled_from(NASTY) | st.text(
    st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=8
)
RELATIVE = st.lists(SEGMENT, min_size=1, max_size=5).map("/".join)


@pytest.mark.parametrize("prefix", ["s3://bucket/x", "/data", "/"])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@given(paths=st.sets(RELATIVE, min_size=1, max_size=30))
def test_output_names_are_safe_and_never_collide(prefix, suffix, paths):
    names = {output_name(f"{prefix.rstrip('/')}/{path}", prefix, suffix) for path in paths}
    assert len(names) == len(paths)
    for name in names:
        assert name.endswith(suffix)
        for segment in name.split("/"):
            assert segment and segment[0] != "." and segment.isprintable()
            assert len(segment.encode()) <= 255
        assert os.path.normpath(f"/out/{name}") == f"/out/{name}"
        directories = name.split("/")[:-1]
        parents = {"/".join(directories[:depth]) for depth in range(1, len(directories) + 1)}
        assert not parents & names


@given(paths=st.sets(RELATIVE, min_size=1, max_size=10))
def test_output_names_can_be_written_side_by_side(paths, tmp_path_factory):
    root = tmp_path_factory.mktemp("out")
    for path in paths:
        file = root / output_name(f"/data/{path}", "/data", ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    assert sum(len(files) for _, _, files in os.walk(root)) == len(paths)


@given(st.sets(RELATIVE, min_size=1, max_size=10), st.sampled_from(["/d", "s3://b", "s3://b/d"]))
def test_the_common_prefix_is_the_deepest_directory_of_all(paths, root):
    uris = sorted(f"{root}/{path}" for path in paths)
    directories = [uri.split("/")[:-1] for uri in uris]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*directories, strict=False))
    assert common_prefix(uris) == "/".join(names[0] for names in shared)
