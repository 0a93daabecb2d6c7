"""Decode images: encoded bytes → pixels.

Pillow recognises the format and decodes unusual images. Usual ones, 8-bit grey and RGB in JPEG and
PNG, go through kornia-rs, which gives the same pixels in a third (PNG) to two thirds (JPEG) of the
time (`python -m benchmarks.decode`). docs/images.md lists the outcome for every kind of image.

The pipelines run this module in a child process, see `decode_in_child`.
"""

import io
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kornia_rs
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from padim_ray.errors import ImageError
from padim_ray.images.limits import FORMATS
from padim_ray.images.preprocessing import GreyRange

Image.MAX_IMAGE_PIXELS = None  # `open_image` has a limit of its own
_TILE_WIDTH, _TILE_LENGTH = ExifTags.Base.TileWidth, ExifTags.Base.TileLength
_PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # may hold EXIF data, too
_MISSING = 128  # JPEG decoders fill missing pixels with this grey
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by EXIF orientation."""


def decode(data: bytes, max_pixels: int, grey_range: GreyRange | None = None) -> np.ndarray:
    """Decode an image and turn it upright.

    EXIF orientation is applied; of several frames the first is taken; palettes are looked up,
    transparency is ignored; CMYK is converted without a profile. 16-bit grey is divided by 257,
    unless a range is given, which also serves signed, 32-bit and floating-point grey.

    Args:
        data: the encoded image.
        max_pixels: larger images fail before they take any memory.
        grey_range: of grey pixels with more than 8 bits.

    Returns:
        Pixels (H, W), grey, or (H, W, 3), RGB; uint8.

    Raises:
        ImageError: if the bytes are not an image, or the image is broken, too large or unsupported.
    """
    with open_image(data, max_pixels, "decode") as image:
        pixels = _decode_usual(image, data)
        return _decode_any(image, data, grey_range) if pixels is None else pixels


def decode_scaled(
    data: bytes,
    max_pixels: int,
    smallest: tuple[int, int],
    grey_range: GreyRange | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode as `decode` does, but large JPEGs at 1/2, 1/4 or 1/8 of their size.

    libjpeg skips the high frequencies, which is cheaper than to decode and average them.

    Args:
        data: the encoded image.
        max_pixels: larger images fail before they take any memory.
        smallest: the least height and width to decode to.
        grey_range: of grey pixels with more than 8 bits.

    Returns:
        The pixels, and the width and height of the full-size upright image.

    Raises:
        ImageError: as for `decode`.
    """
    with open_image(data, max_pixels, "decode") as image:
        size = image.size
        if image.mode in ("L", "RGB") and _orientation(image) not in _TURNS:
            image.draft(image.mode, smallest[::-1])  # only JPEG has it
        if image.size != size:
            scaled = np.asarray(image)
            if not (scaled[-1, -8:] == _MISSING).all():
                return scaled, size
    # also if the end seems to be missing, which this checks
    pixels = decode(data, max_pixels, grey_range)
    return pixels, pixels.shape[1::-1]


@contextmanager
def open_image(data: bytes, max_pixels: int, stage: str) -> Iterator[Image.Image]:
    """Open an image and read its header only.

    Args:
        data: the encoded image.
        max_pixels: the limit on its size.
        stage: for errors: decode or mask.

    Raises:
        ImageError: if the header can't be read, if the image is too large, or if anything inside
            the block raises.
        MemoryError: as it is.
    """
    if not data:
        raise ImageError(stage, "empty file")
    try:
        with warnings.catch_warnings(action="ignore"):  # about metadata that isn't used
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            tags = getattr(image, "tag_v2", {})  # TIFF: a small image may have one large tile
            for width, height in (
                image.size,
                (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)),
            ):
                if width * height > max_pixels:
                    limit = f"more than --max-image-pixels {max_pixels}"
                    raise ImageError(stage, "too many pixels", f"{width}×{height}, {limit}")
            yield image
    except UnidentifiedImageError as error:
        for kind in FORMATS:
            _, is_of_kind = Image.OPEN[kind]
            if is_of_kind and is_of_kind(data[:16]):
                detail = f"{kind}: broken, or of an unsupported kind"
                raise ImageError(stage, "unreadable header", detail) from error
        raise ImageError(stage, f"not a {', '.join(FORMATS)} image") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise ImageError(stage, "broken image", str(error)) from error


def load_upright(image: Image.Image, data: bytes) -> Image.Image:
    """Decode by Pillow and turn upright. PNG checksums, which Pillow doesn't verify, are checked.

    Raises:
        Exception: of any type, if the image is broken.
    """
    if image.format == "PNG":
        _check_png(data)
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the metadata are broken; the pixels may be fine
        return 1


def _decode_usual(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Decode an upright 8-bit JPEG or PNG by kornia-rs; None if it is of another kind or broken."""
    kind = {"L": "mono", "RGB": "rgb"}.get(image.mode)
    if kind is None or not _is_usual(image, data):
        return None
    try:
        if image.format == "PNG":
            pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], kind)
        else:
            pixels = kornia_rs.io.decode_image_jpegturbo(data, kind)
    except Exception:  # kornia-rs has no narrower type; Pillow decides whether the image is broken
        if image.format == "JPEG" and (np.asarray(image)[-1, -8:] == _MISSING).all():
            raise ValueError("its data end early") from None
        return None
    return pixels[..., 0] if kind == "mono" else pixels


def _is_usual(image: Image.Image, data: bytes) -> bool:
    match image.format:
        case "JPEG":
            return _orientation(image) not in _TURNS
        case "PNG":
            # 8 bits, not interlaced, one frame; metadata after the pixels may hold an orientation
            return (data[24], data[28]) == (8, 0) and not any(
                kind in (b"acTL", b"eXIf") or bytes(content[:32]).startswith(_PNG_TEXTS)
                for kind, content in _read_chunks(data)
            )
    return False


def _decode_any(image: Image.Image, data: bytes, grey_range: GreyRange | None) -> np.ndarray:
    upright = load_upright(image, data)
    tags = getattr(image, "tag_v2", {})
    match upright.mode:
        case "RGB" | "L":
            pass
        case "1":
            upright = upright.convert("L")
        case "LA" | "La":
            upright = upright.getchannel("L")
        case mode if mode.startswith("I;16"):
            return _to_eight_bits(np.asarray(upright), tags, grey_range)
        case "I" | "F":
            if grey_range:
                return _to_eight_bits(np.asarray(upright), tags, grey_range)
            raise ImageError("decode", "32-bit pixels, whose range nothing tells")
        case _:
            upright = upright.convert("RGB")
    return np.asarray(upright)


def _to_eight_bits(
    grey: np.ndarray, tags: Mapping[int, Any], grey_range: GreyRange | None
) -> np.ndarray:
    """Scale deep grey to 8 bits; Pillow leaves it as stored.

    A TIFF may also be stored inverted.

    Raises:
        ImageError: if a pixel is NaN.
    """
    if grey_range:
        black, white = grey_range
        scaled = (grey.astype(np.float64) - black) * (255 / (white - black))
        if np.isnan(scaled).any():
            raise ImageError("decode", "pixels that are not numbers")
        shades = np.rint(scaled.clip(0, 255))
    else:
        (bits,) = tags.get(ExifTags.Base.BitsPerSample, (16,))
        highest = 2**bits - 1
        shades = (grey.astype(np.uint32) * 255 + highest // 2) // highest
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return (255 - shades if is_inverted else shades).astype(np.uint8)


def _check_png(data: bytes) -> None:
    """Verify checksums, because Pillow doesn't verify those of the pixels.

    Raises:
        ValueError: if a checksum is wrong, or the file ends early.
    """
    for kind, content in _read_chunks(data):
        is_critical = not kind[0] & 0x20  # PNG specification, 5.4
        checksum = zlib.crc32(content[:-4], zlib.crc32(kind))
        if is_critical and checksum != int.from_bytes(content[-4:]):
            raise ValueError(f"wrong checksum of {kind!r}")


def _read_chunks(data: bytes) -> list[tuple[bytes, memoryview]]:
    """Split a PNG into chunks: (kind, content with the checksum).

    Raises:
        ValueError: if the file ends before the last chunk does.
    """
    chunks = []
    view, start, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        kind = data[start + 4 : start + 8]
        content = start + 8
        start = content + int.from_bytes(data[start : start + 4]) + 4
        if start > len(data):
            raise ValueError("the file ends early")
        chunks.append((kind, view[content:start]))
    return chunks


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Expand grey pixels (H, W) to (H, W, 3); RGB stays as it is."""
    return np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
