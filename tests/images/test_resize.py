import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import BACKGROUND, model_input

SIDES = st.integers(1, 400)


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "RGB"])
@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES, seed=st.integers(0, 999))
def test_resizing_is_within_a_level_of_pillows(channels, height, width, rows, columns, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    resized = model_input(noise, Preprocessing((rows, columns)))
    image = Image.fromarray(noise).resize((columns, rows), Image.Resampling.BILINEAR)
    expected = np.asarray(image.convert("RGB"))
    assert resized.shape == (rows, columns, 3) and resized.dtype == np.uint8
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_an_image_of_the_right_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    np.testing.assert_array_equal(model_input(pixels, Preprocessing((32, 48))), pixels)


def test_the_crop_is_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    whole = model_input(pixels, Preprocessing((64, 64)))
    centre = model_input(pixels, Preprocessing((64, 64), (32, 48)))
    np.testing.assert_array_equal(centre, whole[16:48, 8:56])


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "RGB"])
@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES)
def test_a_letterboxed_image_lies_in_a_plain_background(channels, height, width, rows, columns):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, *channels), np.uint8)
    preprocessing = Preprocessing((rows, columns), letterbox=True)
    found = model_input(pixels, preprocessing)
    assert found.shape == (rows, columns, 3)
    place = preprocessing.placement(height, width)
    inside = place.inside((rows, columns))
    stretched = model_input(pixels, Preprocessing((place.height, place.width)))
    np.testing.assert_array_equal(found[inside], stretched)
    around = np.ones((rows, columns), bool)
    around[inside] = False
    assert (found[around] == BACKGROUND).all()
