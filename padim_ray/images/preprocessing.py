"""How an image becomes the model's input: the sizes of resizing and cropping."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from padim_ray.errors import ModelError

GreyRange = tuple[float, float]
"""The values of grey pixels with more than 8 bits that become black and white."""


class Placement(NamedTuple):
    """Where the whole of an image lies in the model's input, in pixels of the input.

    Where it was cropped, it begins above or to the left of the input, or ends beyond it. Where its
    aspect ratio was kept, the input shows more than the image.
    """

    top: int
    left: int
    height: int
    width: int

    def paste(self, image: np.ndarray, canvas: np.ndarray) -> None:
        """Copy the image (height, width, …) to the input (H, W, …)."""
        rows, columns = self.inside(canvas.shape[:2])
        canvas[rows, columns] = image[
            rows.start - self.top : rows.stop - self.top,
            columns.start - self.left : columns.stop - self.left,
        ]

    def inside(self, size: tuple[int, ...]) -> tuple[slice, slice]:
        """The rows and columns of an input of that size that show the image."""
        return (
            slice(max(0, self.top), min(size[0], self.top + self.height)),
            slice(max(0, self.left), min(size[1], self.left + self.width)),
        )


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `resize`, then crop the centre.

    Images are stretched to the size; with `letterbox` they keep their aspect ratio, and lie in the
    middle of a plain background. Sizes are (height, width) in pixels. With `scaled_jpeg`, large
    JPEGs are decoded at a half, a quarter or an eighth of their size. `grey_range` has the values
    of grey pixels with more than 8 bits that become black and white; values outside are clipped. By
    default these are 0 and the largest value that 16 bits, or a TIFF's 12, can hold.

    Raises:
        ModelError: if the crop is larger than the resized image, or the range is empty.
    """

    resize: tuple[int, int]
    crop: tuple[int, int] | None = None
    scaled_jpeg: bool = False
    grey_range: GreyRange | None = None
    letterbox: bool = False

    def __post_init__(self) -> None:
        if self.grey_range and not self.grey_range[0] < self.grey_range[1]:
            black, white = self.grey_range
            raise ModelError(f"The grey range must ascend, and {black:g} is not below {white:g}")
        if self.crop and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
            (height, width), (rows, columns) = self.crop, self.resize
            raise ModelError(
                f"The crop {height}×{width} is larger than the resized image {rows}×{columns}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.crop or self.resize

    def placement(self, height: int, width: int) -> Placement:
        """Where an image of this size lies in the model's input."""
        (rows, columns), size = self.resize, self.size
        if self.letterbox:
            scale = min(rows / height, columns / width)
            rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        # first the crop of the resized image, then the image in it: each rounds by itself
        top, left = (
            (whole - part) // 2 - (whole - seen) // 2
            for whole, part, seen in zip(self.resize, (rows, columns), size, strict=True)
        )
        return Placement(top, left, rows, columns)
