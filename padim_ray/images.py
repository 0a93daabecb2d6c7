"""Images: encoded bytes → pixels → what the trunk sees.

Pillow says what an image is and decodes whatever is unusual. The usual kinds, 8-bit grey and RGB in
JPEG and PNG, go through kornia-rs, which gives the same pixels in a third (PNG) to two thirds
(JPEG) of the time. Resizing is Pillow's antialiased bilinear by cykooz.resizer: equal to within one
level, in a quarter of the time. `python -m benchmarks.decode` measures both.
"""

import io
import warnings

import kornia_rs
import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from padim_ray.errors import ImageError
from padim_ray.preprocessing import Preprocessing

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")

_RESIZER = Resizer()
_BILINEAR = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear), use_alpha=False)


def decode(data: bytes) -> np.ndarray:
    """Decode an image, upright: (H, W) grey or (H, W, 3) RGB, uint8.

    Rules: EXIF orientation is applied; of several frames the first counts; 16-bit greys are divided
    by 257; palettes are looked up and transparency ignored; CMYK is converted without a profile.

    Raises:
        ImageError: if the bytes are no image, a broken one, or of an unsupported kind.
    """
    if not data:
        raise ImageError("decode", "empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata that we don't use
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = _decode_usual(image, data)
            return _decode_any(image) if pixels is None else pixels
    except UnidentifiedImageError as error:
        raise ImageError("decode", f"not a {', '.join(FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("decode", "too many pixels", str(error)) from error
    except ImageError:
        raise
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise ImageError("decode", "broken image", str(error)) from error


def _decode_usual(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The pixels of an upright 8-bit JPEG or PNG; None if it is something else, or broken."""
    kind = {"L": "mono", "RGB": "rgb"}.get(image.mode)
    if kind is None or getattr(image, "n_frames", 1) > 1:
        return None
    try:
        match image.format:
            case "JPEG" if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                pixels = kornia_rs.io.decode_image_jpegturbo(data, kind)
            # bit depth 8, not interlaced, without EXIF (which may stand after the pixels)
            case "PNG" if data[24] == 8 and data[28] == 0 and b"eXIf" not in data:
                pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], kind)
            case _:
                return None
    except Exception:  # all that kornia-rs raises; Pillow then decides whether the image is broken
        return None
    return pixels[..., 0] if kind == "mono" else pixels


def _decode_any(image: Image.Image) -> np.ndarray:
    image.load()
    image = ImageOps.exif_transpose(image)
    match image.mode:
        case "RGB" | "L":
            pass
        case "1":
            image = image.convert("L")
        case "LA" | "La":
            image = image.getchannel("L")
        case mode if mode.startswith("I;16"):
            return ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        case "I" | "F":
            raise ImageError("decode", "32-bit pixels, whose range nothing tells")
        case _:
            image = image.convert("RGB")
    return np.asarray(image)


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
