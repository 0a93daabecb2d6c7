"""Heatmaps: images under a translucent anomaly map, and the names of their files."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.storage.location import safe_segment

COLORMAP = "inferno"  # perceptually uniform
MAX_SIDE = 1024  # pixels, of the longer side
MIN_SIDE = 256  # pixels, of the shorter side, unless the longer one would exceed MAX_SIDE
FIRST_COLOR = 0.25  # start of the used part: the colour map's dark end would look like a shadow
OPACITY = 0.65


def color_scale(scores: np.ndarray, threshold: float | None = None) -> tuple[float, float]:
    """The distances at which the colours of a group's heatmaps begin and end.

    Most images of an archive are good, and an image's score is its largest distance. Distances
    below the lower quartile of the scores are therefore drawn transparent. The scale ends at a
    quantile, so that a few extreme scores don't stretch it, and well above the threshold, so that
    in a run without defects nothing looks like one.
    """
    low, high = np.quantile(scores, [0.25, 0.995])
    above_threshold = 1.5 * threshold if threshold else 0.0
    return float(low), float(max(high, above_threshold, low * 1.25, low + 1e-6))


def draw_heatmap(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    preprocessing: Preprocessing,
    scale: tuple[float, float],
) -> Image.Image:
    """Draw the anomaly map over the image, in the image's aspect ratio.

    Args:
        image: (H, W, 3) uint8, as decoded.
        anomaly_map: (h, w), of the model's input.
        preprocessing: the model's preprocessing, which says where the image lies in the input.
        scale: distances at both ends of the colour map; opacity grows between them.
    """
    height, width = image.shape[:2]
    factor = min(MAX_SIDE / max(width, height), max(1.0, MIN_SIDE / min(width, height)))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    canvas = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    placement = preprocessing.placement(height, width)
    rows, columns = placement.inside(anomaly_map.shape)
    down, across = size[1] / placement.height, size[0] / placement.width
    top, bottom = (round((row - placement.top) * down) for row in (rows.start, rows.stop))
    left, right = (round((at - placement.left) * across) for at in (columns.start, columns.stop))
    low, high = scale
    heat = Image.fromarray(anomaly_map[rows, columns].astype(np.float32)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR
    )
    # logarithmic colours: the distances of defects span more than a decade
    low = max(low, high / 1000)  # avoids a division by zero
    ratio = np.maximum(np.asarray(heat), low) / low
    strength = np.clip(np.log(ratio) / np.log(high / low), 0, 1)
    colors = matplotlib.colormaps[COLORMAP](FIRST_COLOR + (1 - FIRST_COLOR) * strength, bytes=True)
    colors[..., 3] = np.uint8(255 * OPACITY * np.sqrt(strength))  # faint heat stays visible
    canvas = canvas.convert("RGBA")
    canvas.alpha_composite(Image.fromarray(colors), (left, top))
    return canvas.convert("RGB")


def output_name(uri: str, prefix: str, suffix: str) -> str:
    """The relative path of a file made from an image, derived from the image's own path.

    The path is safe: it has no `..` and no empty, over-long or hidden segment. Paths don't collide:
    different images below `prefix` get different paths, and no path is a directory of another.

    Args:
        uri: of the image, below `prefix`.
        prefix: the directory that paths are relative to.
        suffix: appended to the file name, such as `.png`.
    """
    *directories, name = uri.removeprefix(prefix.rstrip("/") + "/").split("/")
    safe = [safe_segment(directory, without=suffix) for directory in directories]
    return "/".join([*safe, safe_segment(name) + suffix])


def common_prefix(uris: Sequence[str]) -> str:
    """The deepest directory that contains all of the URIs, which are sorted and not empty."""
    first, last = uris[0].split("/")[:-1], uris[-1].split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "/".join(first[:shared])
