import io

import numpy as np
import pytest
from PIL import Image

from padim_ray.errors import ImageError
from padim_ray.images.masks import decode_mask, fit_mask
from padim_ray.images.preprocessing import Preprocessing

TRUTH = np.zeros((12, 20), bool)
TRUTH[3:7, 8:15] = True


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value):
    return Image.fromarray((TRUTH * value).astype(np.uint8))


def palette():
    image = Image.fromarray(TRUTH.astype(np.uint8), "P")
    image.putpalette([9, 9, 9, 0, 0, 0])  # the colours don't matter
    return image


def coloured():
    return Image.fromarray(np.stack([TRUTH * 0, TRUTH * 200, TRUTH * 0], -1).astype(np.uint8))


def opaque(mode):
    image = grey(255).convert(mode)
    image.putalpha(255)
    return image


@pytest.mark.parametrize(
    "data",
    [
        encoded(grey(255)),
        encoded(grey(1)),
        encoded(grey(3)),
        encoded(Image.fromarray(TRUTH)),
        encoded(Image.fromarray(TRUTH.astype(np.uint16) * 65535)),
        encoded(palette()),
        encoded(coloured()),
        encoded(opaque("LA")),
        encoded(opaque("RGBA")),
        encoded(coloured().convert("CMYK"), "TIFF"),
        encoded(grey(255), "BMP"),
        encoded(grey(255), "TIFF"),
        encoded(grey(255).resize((160, 96), 0), "JPEG", quality=70),
    ],
    ids=[
        "255",
        "1",
        "3",
        "1-bit",
        "16-bit",
        "palette",
        "colour",
        "LA",
        "RGBA",
        "CMYK",
        "bmp",
        "tiff",
        "jpeg",
    ],
)
def test_masks_of_any_usual_kind_are_read(data):
    mask = decode_mask(data, max_pixels=20_000)
    np.testing.assert_array_equal(fit_mask(mask, Preprocessing((12, 20))), TRUTH)


def test_a_mask_is_resized_by_nearest_neighbour_and_cropped():
    mask = np.random.default_rng(0).random((64, 48)) > 0.5
    fitted = fit_mask(mask, Preprocessing((32, 96), (16, 32)))
    expected = mask[1::2].repeat(2, axis=1)[8:24, 32:64]
    np.testing.assert_array_equal(fitted, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "mask: empty file"),
        (b"<html></html>", "mask: not a PNG"),
        (encoded(grey(255))[:60], "mask: broken image"),
        (encoded(Image.new("1", (200, 200))), "mask: too many pixels .200×200, more than"),
    ],
)
def test_unreadable_masks_fail_with_their_reason(data, message):
    with pytest.raises(ImageError, match=message):
        decode_mask(data, max_pixels=20_000)


def test_a_mask_of_a_letterboxed_image_lies_where_the_image_does():
    fitted = fit_mask(TRUTH, Preprocessing((40, 40), letterbox=True))
    place = Preprocessing((40, 40), letterbox=True).placement(*TRUTH.shape)
    inside = place.inside((40, 40))
    stretched = fit_mask(TRUTH, Preprocessing((place.height, place.width)))
    np.testing.assert_array_equal(fitted[inside], stretched)
    assert fitted.sum() == stretched.sum() > 0
