"""Decoding and resizing compared with Pillow: `python -m benchmarks.decode`."""

import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from PIL import Image

from benchmarks.archive import ARCHIVES, draw
from benchmarks.timing import Figure, cores, rates
from padim_ray.images.decode import decode
from padim_ray.images.decode_in_child import ModelInput, decode_all
from padim_ray.images.limits import MAX_IMAGE_PIXELS
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import model_input

PREPROCESSING = Preprocessing((256, 256))
KINDS = {
    **ARCHIVES,
    "PNG 700²": (700, "RGB", "PNG"),
    "JPEG grey 300²": (300, "L", "JPEG"),
    "WebP 700²": (700, "RGB", "WEBP"),
    "BMP 700²": (700, "RGB", "BMP"),
    "TIFF 700²": (700, "RGB", "TIFF"),
}


def measure(repeats: int) -> list[Figure]:
    """Images/s of one core from bytes to 256×256 RGB, also in a child process as in jobs."""
    work: dict[str, Callable[[], int]] = {}
    for name, kind in KINDS.items():
        data = draw(0, *kind)
        work[f"{name}, ours"] = lambda data=data: len([ours(data)])
        work[f"{name}, ours in a child"] = lambda data=data: in_child([data] * 64)
        work[f"{name}, Pillow"] = lambda data=data: len([pillow(data)])
    return rates("decode, one core", work, repeats)


def measure_all_cores(archive: str) -> float:
    """Images/s of all cores at once: the most that jobs could decode if they did nothing else.

    Cores share caches and power, so the rate is below the number of cores times one core's rate.
    """
    data = draw(0, *ARCHIVES[archive])
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        return sum(pool.map(one_core, [data] * cores()))


def one_core(data: bytes) -> float:
    (row,) = rates("", {"": lambda: len([ours(data)])}, repeats=1, seconds=1)
    return row["median"]


def ours(data: bytes) -> np.ndarray:
    return model_input(decode(data, MAX_IMAGE_PIXELS), PREPROCESSING)


def in_child(contents: list[bytes]) -> int:
    return len(list(decode_all(contents, ModelInput(PREPROCESSING, MAX_IMAGE_PIXELS))))


def pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    resized = image.resize(PREPROCESSING.resize[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized.convert("RGB"))


if __name__ == "__main__":
    for row in measure(repeats=5):
        print(f"{row['what']:<36}{row['median']:>8.0f} images/s")
