"""Heatmaps: the image under a translucent anomaly map, and where it is stored."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.storage.location import safe_segment

COLORMAP = "inferno"  # perceptually uniform
LONGEST_SIDE = 1024
SHORTEST_SIDE = 256
FIRST_COLOR = 0.25  # the map's dark end would look like a shadow
OPACITY = 0.65


def color_scale(scores: np.ndarray, threshold: float | None = None) -> tuple[float, float]:
    """The distances at which a group's colours begin and end.

    Most images of an archive are good, and a good image's score is its largest distance: what lies
    below the lower scores is transparent. A few extreme scores don't stretch the scale. Its end is
    well above the threshold, so that on a night without a defect nothing looks like one.
    """
    low, high = np.quantile(scores, [0.25, 0.995])
    least = 1.5 * threshold if threshold else 0.0
    return float(low), float(max(high, least, low * 1.25, low + 1e-6))


def draw_heatmap(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    preprocessing: Preprocessing,
    scale: tuple[float, float],
) -> Image.Image:
    """Lay the anomaly map over the image, at the image's own aspect ratio.

    Args:
        image: (H, W, 3) uint8, as decoded.
        anomaly_map: (h, w), covering what the model saw of the image.
        preprocessing: the model's, which says where that is.
        scale: distances of the colour map's two ends; opacity grows between them.
    """
    height, width = image.shape[:2]
    factor = min(LONGEST_SIDE / max(width, height), max(1.0, SHORTEST_SIDE / min(width, height)))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    canvas = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (
        round(share * side)
        for share, side in zip(preprocessing.visible_share, size + size, strict=True)
    )
    low, high = scale
    heat = Image.fromarray(anomaly_map.astype(np.float32)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR
    )
    # equal ratios of distance look equally different: defects differ by more than a decade
    low = max(low, high / 1000)  # a ratio to zero means nothing
    ratio = np.maximum(np.asarray(heat), low) / low
    strength = np.clip(np.log(ratio) / np.log(high / low), 0, 1)
    colors = matplotlib.colormaps[COLORMAP](FIRST_COLOR + (1 - FIRST_COLOR) * strength, bytes=True)
    colors[..., 3] = np.uint8(255 * OPACITY * np.sqrt(strength))  # faint heat stays visible
    canvas = canvas.convert("RGBA")
    canvas.alpha_composite(Image.fromarray(colors), (left, top))
    return canvas.convert("RGB")


def output_name(uri: str, prefix: str, suffix: str) -> str:
    """A relative path for something made from an image, after the image's own path.

    Safe (no `..`, no empty, over-long or hidden segment) and free of collisions: different images
    below `prefix` get different names, and no name is also a directory of another.
    """
    *directories, name = uri.removeprefix(prefix.rstrip("/") + "/").split("/")
    safe = [safe_segment(directory, without=suffix) for directory in directories]
    return "/".join([*safe, safe_segment(name) + suffix])


def common_prefix(uris: Sequence[str]) -> str:
    """The longest common directory of sorted URIs."""
    first, last = uris[0].split("/")[:-1], uris[-1].split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "/".join(first[:shared])
