import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import ModelError
from padim_ray.images.preprocessing import Preprocessing

SIDES = st.integers(1, 4096)


@given(st.data(), SIDES, SIDES)
def test_the_crop_is_in_the_middle(data, rows, columns):
    height = data.draw(st.integers(1, rows))
    width = data.draw(st.integers(1, columns))
    preprocessing = Preprocessing((rows, columns), (height, width))
    assert preprocessing.size == (height, width)
    left, top, right, bottom = preprocessing.visible_share
    assert (right - left) * columns == pytest.approx(width)
    assert (bottom - top) * rows == pytest.approx(height)
    # opposite margins differ by a pixel at most
    assert -1e-6 <= (1 - right - left) * columns <= 1 + 1e-6
    assert -1e-6 <= (1 - bottom - top) * rows <= 1 + 1e-6


def test_the_visible_share_is_that_of_the_crop():
    assert Preprocessing((256, 256)).visible_share == (0, 0, 1, 1)
    assert Preprocessing((256, 256), (224, 128)).visible_share == (0.25, 0.0625, 0.75, 0.9375)


@pytest.mark.parametrize("crop", [(224, 224), (129, 1), (1, 257)])
def test_a_crop_larger_than_the_image_is_refused(crop):
    with pytest.raises(ModelError, match=r"crop \d+×\d+ is larger than the resized image 128×256"):
        Preprocessing((128, 256), crop)
