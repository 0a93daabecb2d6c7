"""Images: encoded bytes → pixels → what the trunk sees.

Pillow says what an image is and decodes whatever is unusual. The usual kinds, 8-bit grey and RGB in
JPEG and PNG, go through kornia-rs, which gives the same pixels in a third (PNG) to two thirds
(JPEG) of the time. Resizing is Pillow's antialiased bilinear by cykooz.resizer: equal to within one
level, in a quarter of the time. `python -m benchmarks.decode` measures both.

The pipelines do all of this in a process of its own: `decoder`. What becomes of which kind of image
stands in docs/images.md.
"""

import io
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kornia_rs
import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, UnidentifiedImageError

from padim_ray.errors import ImageError
from padim_ray.images.preprocessing import FORMATS, Preprocessing

Image.MAX_IMAGE_PIXELS = None  # in its place, `open_image` holds every image against a given limit
_RESIZER = Resizer()
_BILINEAR = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear), use_alpha=False)
_TILE_WIDTH, _TILE_LENGTH = ExifTags.Base.TileWidth, ExifTags.Base.TileLength
_PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # where EXIF data may stand, too
_MISSING = 128  # the shade that JPEG decoders fill in for what isn't there
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by EXIF orientation."""


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image, upright: (H, W) grey or (H, W, 3) RGB, uint8.

    Rules: EXIF orientation is applied; of several frames the first counts; 16-bit greys are divided
    by 257; palettes are looked up and transparency ignored; CMYK is converted without a profile.

    Args:
        max_pixels: an image of more fails, before it takes any memory.

    Raises:
        ImageError: if the bytes are no image, a broken one, too large, or of an unsupported kind.
    """
    with open_image(data, max_pixels, "decode") as image:
        pixels = _decode_usual(image, data)
        return _decode_any(image, data) if pixels is None else pixels


def decode_scaled(
    data: bytes, max_pixels: int, smallest: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """As `decode`, but a JPEG may come at a half, a quarter or an eighth of its size.

    libjpeg leaves out the fine frequencies, which costs less than decoding and averaging them.

    Args:
        smallest: height and width that are needed at least.

    Returns:
        The pixels, and the upright image's own width and height.

    Raises:
        ImageError: as `decode`.
    """
    with open_image(data, max_pixels, "decode") as image:
        size = image.size
        if image.mode in ("L", "RGB") and _orientation(image) not in _TURNS:
            image.draft(image.mode, smallest[::-1])  # only JPEG has it
        if image.size != size:
            scaled = np.asarray(image)
            if not (scaled[-1, -8:] == _MISSING).all():
                return scaled, size
    pixels = decode(data, max_pixels)  # which also finds out whether the end is missing
    return pixels, pixels.shape[1::-1]


@contextmanager
def open_image(data: bytes, max_pixels: int, stage: str) -> Iterator[Image.Image]:
    """The image, of which only the header is read yet.

    Raises:
        ImageError: of this stage, if that can't be, if the image is too large, and for whatever
            goes wrong inside the `with`.
    """
    if not data:
        raise ImageError(stage, "empty file")
    try:
        with warnings.catch_warnings(action="ignore"):  # of broken metadata that we don't use
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
            if Image.OPEN[kind][1](data[:16]):
                detail = f"{kind}: broken, or of an unsupported kind"
                raise ImageError(stage, "unreadable header", detail) from error
        raise ImageError(stage, f"not a {', '.join(FORMATS)} image") from error
    except ImageError:
        raise
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise ImageError(stage, "broken image", str(error)) from error


def load_upright(image: Image.Image, data: bytes) -> Image.Image:
    """Decode by Pillow, where what Pillow doesn't check is checked, and turn upright.

    Raises:
        Exception: if the image is broken.
    """
    if image.format == "PNG":
        _check_png(data)
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata, of whatever kind: the pixels may be fine
        return 1


def _decode_usual(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The pixels of an upright 8-bit JPEG or PNG; None if it is something else, or broken."""
    kind = {"L": "mono", "RGB": "rgb"}.get(image.mode)
    if kind is None or not _is_usual(image, data):
        return None
    try:
        if image.format == "PNG":
            pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], kind)
        else:
            pixels = kornia_rs.io.decode_image_jpegturbo(data, kind)
    except Exception:  # all that kornia-rs raises; Pillow then decides whether the image is broken
        if image.format == "JPEG" and (np.asarray(image)[-1, -8:] == _MISSING).all():
            raise ValueError("its data end early") from None
        return None
    return pixels[..., 0] if kind == "mono" else pixels


def _is_usual(image: Image.Image, data: bytes) -> bool:
    match image.format:
        case "JPEG":
            return _orientation(image) not in _TURNS
        case "PNG":
            # 8 bits, not interlaced, one frame; metadata that may turn it can follow the pixels
            return (data[24], data[28]) == (8, 0) and not any(
                kind in (b"acTL", b"eXIf") or bytes(content[:32]).startswith(_PNG_TEXTS)
                for kind, content in _read_chunks(data)
            )
    return False


def _decode_any(image: Image.Image, data: bytes) -> np.ndarray:
    upright = load_upright(image, data)
    match upright.mode:
        case "RGB" | "L":
            pass
        case "1":
            upright = upright.convert("L")
        case "LA" | "La":
            upright = upright.getchannel("L")
        case mode if mode.startswith("I;16"):
            return _to_eight_bits(np.asarray(upright), getattr(image, "tag_v2", {}))
        case "I" | "F":
            raise ImageError("decode", "32-bit pixels, whose range nothing tells")
        case _:
            upright = upright.convert("RGB")
    return np.asarray(upright)


def _to_eight_bits(grey: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """What Pillow leaves as it stands in the file: 16 bits, or 12 in TIFF; there also inverted."""
    (bits,) = tags.get(ExifTags.Base.BitsPerSample, (16,))
    highest = 2**bits - 1
    shades = (grey.astype(np.uint32) * 255 + highest // 2) // highest
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return (255 - shades if is_inverted else shades).astype(np.uint8)


def _check_png(data: bytes) -> None:
    """Pillow doesn't compare the pixels' checksums, and decodes zeros, say, to black."""
    for kind, content in _read_chunks(data):
        is_needed = not kind[0] & 0x20  # PNG specification, 5.4
        if is_needed and zlib.crc32(content[:-4], zlib.crc32(kind)) != int.from_bytes(content[-4:]):
            raise ValueError(f"wrong checksum of {kind!r}")


def _read_chunks(data: bytes) -> list[tuple[bytes, memoryview]]:
    """A PNG's chunks: their kinds, and their contents with the checksum.

    Raises:
        ValueError: if the last one is missing, or a part of it.
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


def model_input(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop decoded pixels → (H, W, 3) uint8.

    Args:
        pixels: (H, W) or (H, W, 3) uint8. A grey image is resized before it is expanded: three
            equal channels would come out the same.
    """
    rows, columns = preprocessing.resize
    kind = PixelType.U8 if pixels.ndim == 2 else PixelType.U8x3
    source = ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    target = ImageData(columns, rows, kind)
    _RESIZER.resize(source, target, _BILINEAR)
    resized = np.frombuffer(target.get_buffer(), np.uint8).reshape(rows, columns, -1)
    (top, left), (height, width) = preprocessing.corner, preprocessing.size
    return np.broadcast_to(resized, (rows, columns, 3))[top : top + height, left : left + width]


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Expand decoded grey pixels to three channels; (H, W, 3) stays as it is."""
    return np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
