"""Images: encoded bytes → RGB pixels → what the trunk sees."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from padim_ray.errors import ImageError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `resize` (height, width), whatever the aspect, then keep the centre `crop`."""

    resize: tuple[int, int]
    crop: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.crop and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
            raise ValueError(f"the crop {self.crop} is larger than the resized image {self.resize}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.crop or self.resize

    @property
    def _corner(self) -> tuple[int, int]:
        return (self.resize[0] - self.size[0]) // 2, (self.resize[1] - self.size[1]) // 2

    @property
    def visible_share(self) -> tuple[float, float, float, float]:
        """What the model sees of an image: left, top, right, bottom as shares of its size."""
        (top, left), (height, width) = self._corner, self.size
        rows, columns = self.resize
        return left / columns, top / rows, (left + width) / columns, (top + height) / rows

    def apply(self, image: Image.Image) -> np.ndarray:
        """Antialiased bilinear resize and centre crop → (H, W, 3) uint8."""
        top, left = self._corner
        height, width = self.size
        # a grey image is resized in one channel: three equal ones would give the same
        resized = image.resize((self.resize[1], self.resize[0]), Image.Resampling.BILINEAR)
        cropped = resized.crop((left, top, left + width, top + height))
        return np.asarray(cropped.convert("RGB"))


def decode(data: bytes) -> Image.Image:
    """Decode an image to Pillow mode "L" or "RGB", upright.

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
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ImageError("decode", f"not a {', '.join(FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("decode", "too many pixels", str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all of these
        raise ImageError("decode", "broken image", str(error)) from error
    return _to_8_bit(image)


def _to_8_bit(image: Image.Image) -> Image.Image:
    match image.mode:
        case "RGB" | "L":
            return image
        case "1":
            return image.convert("L")
        case "LA" | "La":
            return image.getchannel("L")
        case mode if mode.startswith("I;16"):
            grey = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        case "I" | "F":
            raise ImageError("decode", "32-bit pixels, whose range nothing tells")
        case _:
            return image.convert("RGB")
