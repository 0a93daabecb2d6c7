"""The camera lights a sheet, poses it and exposes the photograph."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageFilter

from demo.sheet import Sheet

LAMP = np.array([-0.46, -0.56, 0.69], np.float32)  # direction of the lamp; z points to the camera
HALFWAY = LAMP + np.array([0, 0, 1], np.float32)  # between lamp and camera
HALFWAY /= np.linalg.norm(HALFWAY)


def lit(sheet: Sheet) -> Image.Image:
    """The sheet lit by the lamp: diffuse light, highlights and soft shadows."""
    height = np.asarray(sheet.height, np.float32)
    slope_y, slope_x = np.gradient(height * (0.1 * sheet.pixels / 255))
    steepness = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    diffuse, mirror = (
        np.maximum(0, (to[2] - slope_x * to[0] - slope_y * to[1]) * steepness)
        for to in (LAMP, HALFWAY)
    )
    reach = round(0.013 * sheet.pixels)
    cast = ImageChops.offset(sheet.height, reach, reach).filter(ImageFilter.GaussianBlur(reach))
    shadow = np.clip((np.asarray(cast, np.float32) - height) / 220, 0, 0.38)
    light = 0.42 + 0.58 / LAMP[2] * diffuse - shadow
    highlight = 0.7 * np.asarray(sheet.gloss, np.float32) * mirror**16
    shown = np.asarray(sheet.colour, np.float32) * light[..., None] + highlight[..., None]
    return Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))


def posed(canvas: Image.Image, size: int, degrees: float, dx: float, dy: float) -> Image.Image:
    """The canvas rotated, shifted by (dx, dy) pixels, and cropped to the photograph's `size`."""
    shift = (dx, dy)
    turned = canvas.rotate(degrees, Image.Resampling.BICUBIC, translate=shift)
    start = (canvas.width - size) // 2
    return turned.crop((start, start, start + size, start + size))


def exposed(view: Image.Image, rng: Generator) -> Image.Image:
    """The photograph of a view (RGB or grey) with uneven light, white balance and sensor noise."""
    y, x = np.mgrid[-1 : 1 : view.height * 1j, -1 : 1 : view.width * 1j].astype(np.float32)
    tilt_x, tilt_y, warmth = rng.normal((-0.05, -0.06, 0), 0.012)
    lamp = rng.normal(1.04, 0.025) * (1 + tilt_x * x + tilt_y * y - 0.07 * (x**2 + y**2))
    balance = np.array([1 + warmth, 1, 1 - warmth], np.float32)[: len(view.getbands())]
    light = np.atleast_3d(np.asarray(view, np.float32)) * (lamp[..., None] * balance)
    noise = rng.standard_normal(light.shape, np.float32) * (1 + 0.12 * np.sqrt(light))
    return Image.fromarray(np.clip(light + noise + 0.5, 0, 255).astype(np.uint8).squeeze())
