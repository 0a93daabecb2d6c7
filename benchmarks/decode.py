"""Decoding and resizing alone, on one core: ours beside Pillow. `python -m benchmarks.decode`."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.timing import Figure, rates
from padim_ray.decoder import ModelInput, decode_all
from padim_ray.images import decode, model_input
from padim_ray.options import MAX_IMAGE_PIXELS
from padim_ray.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((256, 256))


def measure(repeats: int) -> list[Figure]:
    """Images/s from bytes to 256×256 RGB; also in a child, as jobs do it."""
    work: dict[str, Callable[[], int]] = {}
    for name, data in samples().items():
        work[f"{name}, ours"] = lambda data=data: len([ours(data)])
        work[f"{name}, ours in a child"] = lambda data=data: in_child([data] * 64)
        work[f"{name}, Pillow"] = lambda data=data: len([pillow(data)])
    return rates("decode", work, repeats)


def ours(data: bytes) -> np.ndarray:
    return model_input(decode(data, MAX_IMAGE_PIXELS), PREPROCESSING)


def in_child(contents: list[bytes]) -> int:
    return len(list(decode_all(contents, ModelInput(PREPROCESSING, MAX_IMAGE_PIXELS))))


def pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    resized = image.resize(PREPROCESSING.resize[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized.convert("RGB"))


def samples() -> dict[str, bytes]:
    """One encoded image of each kind: smooth structure with sensor noise."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))

    def encoded(size: int, mode: str, kind: str) -> bytes:
        smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        noisy = smooth + rng.normal(0, 4, smooth.shape)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"quality": 90} if kind in ("JPEG", "WEBP") else {}))
        return buffer.getvalue()

    return {
        "PNG grey 1024²": encoded(1024, "L", "PNG"),
        "PNG 700²": encoded(700, "RGB", "PNG"),
        "JPEG 700²": encoded(700, "RGB", "JPEG"),
        "JPEG grey 300²": encoded(300, "L", "JPEG"),
        "WebP 700²": encoded(700, "RGB", "WEBP"),
        "BMP 700²": encoded(700, "RGB", "BMP"),
        "TIFF 700²": encoded(700, "RGB", "TIFF"),
    }


if __name__ == "__main__":
    for row in measure(repeats=5):
        print(f"{row['what']:<36}{row['median']:>8.0f} images/s")
