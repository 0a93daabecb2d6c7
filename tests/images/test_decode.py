import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from padim_ray.errors import ImageError
from padim_ray.images import decode
from padim_ray.images.decode import as_rgb, decode_scaled
from tests.helpers.corpus import mutated_files

MAX_PIXELS = 1_000_000


def pixels_of(data):
    return decode.decode(data, MAX_PIXELS)


def photo(seed, size, mode="RGB"):
    """Smooth structure with noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(float)
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


SIZES = st.tuples(st.integers(1, 120), st.integers(1, 120))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@given(size=SIZES, seed=st.integers(0, 999))
def test_lossless_formats_give_the_exact_pixels(kind, mode, size, seed):
    image = photo(seed, size, mode)
    np.testing.assert_array_equal(pixels_of(encode(image, kind)), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@given(size=SIZES, seed=st.integers(0, 999), quality=st.integers(30, 98), progressive=st.booleans())
def test_jpegs_are_within_a_level_of_pillows(mode, size, seed, quality, progressive):
    data = encode(photo(seed, size, mode), "JPEG", quality=quality, progressive=progressive)
    difference = np.abs(pixels_of(data).astype(int) - np.asarray(Image.open(io.BytesIO(data))))
    assert np.mean(difference <= 1) >= 0.999


def test_webp_equals_pillows():
    data = encode(photo(1, (90, 70)), "WEBP")
    np.testing.assert_array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("PNG", "RGB"), ("JPEG", "RGB")])
def test_usual_images_take_the_fast_path(kind, mode, monkeypatch):
    monkeypatch.setattr(decode, "_decode_any", None)
    pixels_of(encode(photo(0, (30, 20), mode), kind))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    image = photo(2, (40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif)
    # EXIF 2.3, tag 274, as quarter turns and a mirror that bring the image upright
    turns = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
    quarter_turns, mirrored = turns[orientation]
    stored = np.asarray(Image.open(io.BytesIO(encode(image, kind))))
    expected = np.rot90(stored, quarter_turns)
    np.testing.assert_array_equal(pixels_of(data), expected[:, ::-1] if mirrored else expected)


def test_sixteen_bit_grey_uses_the_full_range():
    deep = np.array([[0, 257, 65535, 32768]], np.uint16)
    data = encode(Image.fromarray(deep), "PNG")
    np.testing.assert_array_equal(pixels_of(data), [[0, 1, 255, 128]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_is_stretched_from_the_given_range(kind):
    deep = np.array([[0, 100, 2000, 4095, 65535]], np.uint16)
    data = encode(Image.fromarray(deep), kind)
    np.testing.assert_array_equal(
        decode.decode(data, MAX_PIXELS, (100, 4095)), [[0, 0, 121, 255, 255]]
    )


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_range_makes_signed_and_floating_point_grey_readable(dtype):
    data = encode(Image.fromarray(np.array([[-500, 0, 250, 500]], dtype)), "TIFF")
    with pytest.raises(ImageError, match="whose range nothing tells"):
        decode.decode(data, MAX_PIXELS)
    np.testing.assert_array_equal(
        decode.decode(data, MAX_PIXELS, (-500, 500)), [[0, 128, 191, 255]]
    )


def test_pixels_that_are_not_numbers_are_refused():
    data = encode(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(ImageError, match="not numbers"):
        decode.decode(data, MAX_PIXELS, (0, 1))


def test_the_range_leaves_eight_bits_alone():
    grey = np.arange(256, dtype=np.uint8)[None]
    for kind in ("PNG", "TIFF"):
        found = decode.decode(encode(Image.fromarray(grey), kind), MAX_PIXELS, (0, 1000))
        np.testing.assert_array_equal(found, grey)


def test_one_bit_becomes_black_and_white():
    data = encode(Image.fromarray(np.array([[True, False]])), "PNG")
    np.testing.assert_array_equal(pixels_of(data), [[255, 0]])


def test_palette_with_transparency_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = encode(image, "PNG", transparency=0)
    np.testing.assert_array_equal(pixels_of(data), [[[10, 20, 30], [200, 100, 50]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_ignored(mode):
    opaque = photo(3, (20, 10), "RGB" if mode == "RGBA" else "L")
    image = opaque.convert(mode)
    image.putalpha(7)
    np.testing.assert_array_equal(pixels_of(encode(image, "PNG")), np.asarray(opaque))


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels_of(encode(image, "JPEG", quality=100))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


def test_an_interlaced_png_is_decoded():
    # Pillow can't write one: adam7 of a single pixel is the pixel
    data = bytearray(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))
    data[28] = 1
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    np.testing.assert_array_equal(pixels_of(bytes(data)), [[[1, 2, 3]]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "decode: empty file"),
        (b"<html>not found</html>", "decode: not a PNG"),
        (encode(photo(0, (64, 64)), "GIF"), "decode: not a PNG"),
        (encode(photo(0, (64, 64)), "PNG")[:2000], "decode: broken image"),
        (encode(photo(0, (64, 64)), "JPEG")[:900], "decode: broken image"),
        (encode(photo(0, (64, 64)), "JPEG")[:20], "decode: "),
        (encode(Image.new("F", (4, 4)), "TIFF"), "decode: 32-bit pixels"),
    ],
)
def test_unreadable_files_fail_with_their_reason(data, message):
    with pytest.raises(ImageError, match=message):
        pixels_of(data)


@settings(max_examples=500)
@given(mutated_files())
def test_mutated_files_are_decoded_or_fail(data):
    try:
        pixels = pixels_of(data)
    except ImageError as error:
        assert str(error).startswith("decode: ")
    else:
        assert pixels.dtype == np.uint8 and 0 < pixels.size <= 3 * MAX_PIXELS


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    data = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (60_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    with pytest.raises(ImageError, match="too many pixels"):
        pixels_of(bytes(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@given(
    size=st.tuples(st.integers(64, 700), st.integers(64, 700)),
    smallest=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 999),
)
def test_a_scaled_jpeg_is_large_enough_and_looks_the_same(mode, size, smallest, seed):
    data = encode(photo(seed, size, mode), "JPEG", quality=90)
    whole = pixels_of(data)
    scaled, (width, height) = decode_scaled(data, MAX_PIXELS, smallest)
    assert (height, width) == whole.shape[:2]
    factor = -(-height // scaled.shape[0])
    assert factor in (1, 2, 4, 8)
    assert scaled.shape[:2] == (-(-height // factor), -(-width // factor))
    if factor == 1:
        np.testing.assert_array_equal(scaled, whole)
    else:
        assert scaled.shape[0] >= smallest[0]
        assert scaled.shape[1] >= smallest[1]
        # blocks at the border cover fewer pixels
        rows, columns = height // factor, width // factor
        scaled_mean = scaled[:rows, :columns].mean((0, 1))
        whole_mean = whole[: rows * factor, : columns * factor].mean((0, 1))
        np.testing.assert_allclose(scaled_mean, whole_mean, atol=4)


def test_only_upright_jpegs_are_scaled():
    image = photo(3, (320, 240))
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (encode(image, "PNG"), encode(image, "JPEG", exif=turned)):
        scaled, size = decode_scaled(data, MAX_PIXELS, (16, 16))
        np.testing.assert_array_equal(scaled, pixels_of(data))
        assert size == scaled.shape[1::-1]


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_cut_jpeg_fails_scaled_as_well(end):
    data = encode(photo(3, (320, 240)), "JPEG")
    with pytest.raises(ImageError, match="broken image"):
        decode_scaled(data[: len(data) // 2] + end, MAX_PIXELS, (16, 16))


def test_grey_expands_to_three_equal_channels():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (as_rgb(grey) == grey[..., None]).all()
    assert as_rgb(grey).shape == (2, 3, 3)
