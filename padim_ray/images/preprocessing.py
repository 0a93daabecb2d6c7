"""How an image becomes the model's input: the sizes of resizing and cropping."""

from dataclasses import dataclass

from padim_ray.errors import ModelError

GreyRange = tuple[float, float]
"""The values of grey pixels with more than 8 bits that become black and white."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `resize`, without regard to the aspect ratio, then crop the centre.

    Sizes are (height, width) in pixels. With `scaled_jpeg`, large JPEGs are decoded at a half, a
    quarter or an eighth of their size. `grey_range` has the values of grey pixels with more than
    8 bits that become black and white; values outside are clipped. By default these are 0 and the
    largest value that 16 bits, or a TIFF's 12, can hold.

    Raises:
        ModelError: if the crop is larger than the resized image, or the range is empty.
    """

    resize: tuple[int, int]
    crop: tuple[int, int] | None = None
    scaled_jpeg: bool = False
    grey_range: GreyRange | None = None

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

    @property
    def corner(self) -> tuple[int, int]:
        """Top and left of the crop in the resized image."""
        return (self.resize[0] - self.size[0]) // 2, (self.resize[1] - self.size[1]) // 2

    @property
    def visible_share(self) -> tuple[float, float, float, float]:
        """The cropped part of an image: left, top, right, bottom as fractions of its size."""
        (top, left), (height, width) = self.corner, self.size
        rows, columns = self.resize
        return left / columns, top / rows, (left + width) / columns, (top + height) / rows
