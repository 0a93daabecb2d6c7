"""Requests answered in this process, without the child around them."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from padim_ray.errors import ImageError
from padim_ray.images.child import fulfil
from padim_ray.images.decode_in_child import Mask, ModelInput, UprightImage
from padim_ray.images.preprocessing import Preprocessing
from tests.helpers.encoders import exif, png, png_chunk

PREPROCESSING = Preprocessing((20, 40), (16, 32))
REQUESTS = [
    ModelInput(PREPROCESSING, 10_000),
    UprightImage(10_000),
    UprightImage(10_000, longest_side=20),
    Mask(PREPROCESSING, 10_000),
]


@pytest.mark.parametrize("request_", REQUESTS)
@given(height=st.integers(1, 60), width=st.integers(1, 60), turned=st.booleans())
def test_an_answer_says_how_large_the_upright_image_is(request_, height, width, turned):
    before = png_chunk(b"eXIf", exif(6)) if turned else b""
    decoded = fulfil(request_, png(np.zeros((height, width), np.uint8), before=before))
    expected = (height, width) if turned else (width, height)
    assert (decoded.width, decoded.height) == expected


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_a_shrunk_image_keeps_its_aspect(height, width, longest_side):
    image = png(np.zeros((height, width), np.uint8))
    rows, columns, _ = fulfil(UprightImage(10**6, longest_side), image).pixels.shape
    factor = min(1, longest_side / max(height, width))
    assert max(rows, columns) == min(longest_side, max(height, width))
    assert abs(rows - height * factor) < 1 and abs(columns - width * factor) < 1


def test_an_unshrunk_image_has_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    np.testing.assert_array_equal(fulfil(UprightImage(10_000), png(pixels)).pixels, pixels)
    np.testing.assert_array_equal(fulfil(UprightImage(10_000, 30), png(pixels)).pixels, pixels)


def test_a_model_s_input_is_resized_and_cropped():
    steps = np.arange(16, 256, 32, np.uint8).repeat(5)  # 40 columns: nothing is resized
    decoded = fulfil(ModelInput(PREPROCESSING, 10_000), png(np.tile(steps, (20, 1))))
    np.testing.assert_array_equal(decoded.pixels[..., 2], np.tile(steps[4:36], (16, 1)))


def test_deep_grey_has_the_requested_range():
    data = io.BytesIO()
    Image.fromarray(np.full((20, 40), 2048, np.uint16)).save(data, "PNG")
    preprocessing = Preprocessing((20, 40), grey_range=(0, 4096))
    for request_ in (ModelInput(preprocessing, 10_000), UprightImage(10_000, None, (0, 4096))):
        assert (fulfil(request_, data.getvalue()).pixels == 128).all()


def test_a_mask_is_resized_and_cropped():
    defective = np.zeros((10, 20), np.uint8)
    defective[5:, 10:] = 1
    mask = fulfil(Mask(PREPROCESSING, 10_000), png(defective)).pixels
    expected = np.zeros((16, 32), bool)
    expected[8:, 16:] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("scaled_jpeg", [False, True])
def test_large_jpegs_are_decoded_at_part_of_their_size_if_wanted(scaled_jpeg):
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480), (200, 100, 50)).save(buffer, "JPEG")
    preprocessing = Preprocessing((20, 40), scaled_jpeg=scaled_jpeg)
    decoded = fulfil(ModelInput(preprocessing, 10**6), buffer.getvalue())
    assert (decoded.width, decoded.height) == (640, 480)
    assert decoded.pixels.shape == (20, 40, 3)
    assert np.abs(decoded.pixels.astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_error_names_its_stage(request_):
    stage = "mask" if isinstance(request_, Mask) else "decode"
    for content in (b"", b"text", png(np.zeros((101, 100), np.uint8))):
        with pytest.raises(ImageError, match=f"^{stage}: "):
            fulfil(request_, content)
