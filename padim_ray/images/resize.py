"""Resize decoded pixels to the model's input.

The filter is Pillow's antialiased bilinear, computed by cykooz.resizer: equal to within one grey
level, in a quarter of the time (`python -m benchmarks.decode`).
"""

import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

from padim_ray.images.preprocessing import Preprocessing

BACKGROUND = (124, 116, 104)
"""Around images that keep their aspect ratio: ImageNet's mean, which is 0 after normalisation."""
_RESIZER = Resizer()
_BILINEAR = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear), use_alpha=False)


def model_input(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an image, place it in the model's input and expand grey to RGB.

    Args:
        pixels: (h, w), grey, or (h, w, 3), RGB; uint8.
        preprocessing: the sizes.

    Returns:
        The model's input (H, W, 3) uint8.
    """
    placement = preprocessing.placement(*pixels.shape[:2])
    rows, columns = placement.height, placement.width
    # grey is resized before it is expanded: three equal channels would come out the same
    kind = PixelType.U8 if pixels.ndim == 2 else PixelType.U8x3
    source = ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    target = ImageData(columns, rows, kind)
    _RESIZER.resize(source, target, _BILINEAR)
    resized = np.frombuffer(target.get_buffer(), np.uint8).reshape(rows, columns, -1)
    canvas = np.empty((*preprocessing.size, 3), np.uint8)
    if preprocessing.letterbox:
        canvas[:] = BACKGROUND
    placement.paste(np.broadcast_to(resized, (rows, columns, 3)), canvas)
    return canvas
