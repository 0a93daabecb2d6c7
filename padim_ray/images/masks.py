"""Ground-truth masks: which pixels are defective, as people store it."""

import numpy as np
from PIL import Image

from padim_ray.images.decode import load_upright, open_image
from padim_ray.images.preprocessing import Preprocessing


def decode_mask(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a mask, upright: (H, W) bool, true where defective.

    Defective is what isn't 0 (in any channel, or index of a palette; transparency is ignored), so
    0/255, 0/1, 1-bit and numbered regions all do. In JPEG, whose compression leaves traces, it is
    what is above half.

    Args:
        max_pixels: a mask of more fails, before it takes any memory.

    Raises:
        ImageError: if the bytes are no image, a broken one, or too large.
    """
    with open_image(data, max_pixels, "mask") as image:
        least = 128 if image.format == "JPEG" else 1
        upright = load_upright(image, data)
        if upright.mode not in ("1", "L", "P", "I", "F", "RGB") and upright.mode[:2] != "I;":
            upright = upright.convert("P" if upright.mode == "PA" else "RGB")
        pixels = np.asarray(upright)
    defective = pixels >= least
    return defective.any(-1) if defective.ndim == 3 else defective


def fit_mask(mask: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Bring a mask (H, W) to the anomaly map's size by nearest neighbour, then crop it."""
    rows, columns = preprocessing.resize
    resized = Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST)
    (top, left), (height, width) = preprocessing.corner, preprocessing.size
    return np.asarray(resized, bool)[top : top + height, left : left + width]
