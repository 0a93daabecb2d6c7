import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import ModelError
from padim_ray.images.preprocessing import Preprocessing

SIDES = st.integers(1, 4096)


@given(st.data(), SIDES, SIDES, st.tuples(SIDES, SIDES))
def test_the_crop_is_in_the_middle_of_a_stretched_image(data, rows, columns, image):
    height = data.draw(st.integers(1, rows))
    width = data.draw(st.integers(1, columns))
    preprocessing = Preprocessing((rows, columns), (height, width))
    assert preprocessing.size == (height, width)
    placement = preprocessing.placement(*image)
    assert (placement.height, placement.width) == (rows, columns)
    # opposite margins differ by a pixel at most
    assert 0 <= rows - height + 2 * placement.top <= 1
    assert 0 <= columns - width + 2 * placement.left <= 1
    assert placement.inside((height, width)) == (slice(0, height), slice(0, width))


@given(st.data(), SIDES, SIDES, SIDES, SIDES)
def test_a_letterboxed_image_keeps_its_aspect_ratio_and_fills_one_side(
    data, rows, columns, height, width
):
    found = Preprocessing((rows, columns), letterbox=True).placement(height, width)
    assert found.height == rows or found.width == columns
    assert found.height <= rows and found.width <= columns
    scale = min(rows / height, columns / width)
    assert abs(found.height - height * scale) <= 0.5 or found.height == 1
    assert abs(found.width - width * scale) <= 0.5 or found.width == 1
    assert 0 <= rows - found.height - 2 * found.top <= 1
    assert 0 <= columns - found.width - 2 * found.left <= 1


@given(st.data(), *[st.integers(1, 40)] * 4)
def test_pasting_copies_what_both_show(data, rows, columns, height, width):
    """Pixel by pixel, cropped and letterboxed."""
    crop = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    placement = Preprocessing((rows, columns), crop, letterbox=True).placement(height, width)
    image = np.arange(1, placement.height * placement.width + 1).reshape(placement[2:])
    canvas = np.zeros(crop, int)
    placement.paste(image, canvas)
    for y, x in np.ndindex(crop):
        v, u = y - placement.top, x - placement.left
        is_shown = 0 <= v < placement.height and 0 <= u < placement.width
        assert canvas[y, x] == (image[v, u] if is_shown else 0)


@pytest.mark.parametrize("crop", [(224, 224), (129, 1), (1, 257)])
def test_a_crop_larger_than_the_image_is_refused(crop):
    with pytest.raises(ModelError, match=r"crop \d+×\d+ is larger than the resized image 128×256"):
        Preprocessing((128, 256), crop)
