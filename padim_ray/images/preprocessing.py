"""How an image becomes the model's input: the sizes of resizing and cropping."""

from dataclasses import dataclass

from padim_ray.errors import ModelError


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `resize`, without regard to the aspect ratio, then crop the centre.

    Sizes are (height, width) in pixels. With `scaled_jpeg`, large JPEGs are decoded at a half, a
    quarter or an eighth of their size.

    Raises:
        ModelError: if the crop is larger than the resized image.
    """

    resize: tuple[int, int]
    crop: tuple[int, int] | None = None
    scaled_jpeg: bool = False

    def __post_init__(self) -> None:
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
