"""Ground-truth masks: decode them, and fit them to the anomaly map."""

import numpy as np
from PIL import Image

from padim_ray.images.decode import load_upright, open_image
from padim_ray.images.preprocessing import Preprocessing


def decode_mask(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a mask and turn it upright.

    A pixel is defective if any channel, or its palette index, is not 0. So masks of 0 and 255, of 0
    and 1, of 1 bit and with numbered regions all work. Transparency is ignored. In a JPEG, whose
    compression changes values a little, a pixel is defective from 128 on.

    Args:
        data: the encoded mask.
        max_pixels: larger masks fail before they take any memory.

    Returns:
        (H, W) bool, true where defective.

    Raises:
        ImageError: if the bytes are not an image, or the image is broken or too large.
    """
    with open_image(data, max_pixels, "mask") as image:
        least = 128 if image.format == "JPEG" else 1
        upright = load_upright(image, data)
        if upright.mode not in ("1", "L", "P", "I", "F", "RGB") and upright.mode[:2] != "I;":
            upright = upright.convert("P" if upright.mode == "PA" else "RGB")
        pixels = np.asarray(upright)
    defective = pixels >= least
    return np.asarray(defective.any(-1)) if defective.ndim == 3 else defective


def fit_mask(mask: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize a mask (h, w) by nearest neighbour to the image's place in the map (H, W); bool."""
    placement = preprocessing.placement(*mask.shape)
    size = placement.width, placement.height
    resized = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    fitted = np.zeros(preprocessing.size, bool)
    placement.paste(np.asarray(resized, bool), fitted)
    return fitted
