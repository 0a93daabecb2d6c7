"""Sheets, drawings with colour, height and gloss, and the parts that lie on them.

Lengths are fractions of the photograph's edge. Positions count from a sheet's centre, x to the
right and y down. A height of 255 is a tenth of the edge.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, pi, sin

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SUPERSAMPLING = 2  # factor by which sheets are drawn finer than they are used
CANVAS = 1.06  # wider than the photograph, so that a shifted product leaves no empty border

Colour = tuple[int, int, int]
SILVER, STEEL, BLACK, INK = (198, 200, 202), (158, 159, 161), (40, 40, 43), (26, 26, 28)


@dataclass
class Sheet:
    """Layers of one size: RGB `colour`; 8-bit `height`, `gloss` and `cover` (where it is drawn)."""

    colour: Image.Image
    height: Image.Image
    gloss: Image.Image
    cover: Image.Image
    pixels: int  # per photograph edge

    @classmethod
    def blank(cls, width: float, breadth: float, size: int, colour: Colour, height=50) -> "Sheet":
        """An empty sheet of `width` by `breadth`, for photographs with edges of `size` pixels."""
        edges = (round(width * size) * SUPERSAMPLING, round(breadth * size) * SUPERSAMPLING)
        layers = (Image.new("L", edges, level) for level in (height, 0, 0))
        return cls(Image.new("RGB", edges, colour), *layers, size * SUPERSAMPLING)

    def each(self, change: Callable[[Image.Image], Image.Image]) -> "Sheet":
        """The sheet with the same change applied to every layer."""
        layers = (change(layer) for layer in (self.colour, self.height, self.gloss, self.cover))
        return Sheet(*layers, self.pixels)

    def reduced(self) -> "Sheet":
        """The sheet at the photograph's resolution."""
        sheet = self.each(lambda layer: layer.reduce(SUPERSAMPLING))
        return replace(sheet, pixels=self.pixels // SUPERSAMPLING)

    def mark(self, shape, places, colour: Colour, height=None, gloss=30, bevel=0.003, **how):
        """Draw `shape` (an ImageDraw method) at all `places`, with edges rounded by `bevel`.

        Without a `height` the shape is printed flat on the surface below.
        """
        stencil = Image.new("L", self.cover.size)
        pen = ImageDraw.Draw(stencil)
        for place in places:
            points = np.reshape(place, (-1, 2)) * self.pixels + np.array(stencil.size) / 2
            getattr(pen, shape)(points.ravel().tolist(), fill=255, **how)
        self.cover = ImageChops.lighter(self.cover, stencil)
        self.colour.paste(colour, mask=stencil)
        self.gloss.paste(gloss, mask=stencil)
        if height is not None:
            rounded = stencil.filter(ImageFilter.GaussianBlur(bevel * self.pixels))
            self.height.paste(height, mask=rounded)

    def write(self, x, y, text: str, edge: float, colour: Colour, height=None) -> None:
        """Write `text` centred at (x, y) in letters of size `edge`."""
        how = {"text": text, "font_size": edge * self.pixels, "anchor": "mm", "align": "center"}
        self.mark("text", [(x, y)], colour, height, bevel=0.001, **how)


@dataclass(frozen=True)
class Part:
    """A sheet at (x, y), turned by `angle` degrees; `play` bounds its natural rotation in degrees.

    With a `relief` it follows the surface below, raised (or, if negative, sunk) by that height.
    """

    sheet: Sheet
    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    play: float = 0.7
    relief: int | None = None

    def settled(self, rng: Generator) -> "Part":
        """The part with an assembly line's usual variation in position and angle."""
        dx, dy = rng.normal(0, 0.0012, 2)
        turn = rng.uniform(-self.play, self.play)
        return replace(self, x=self.x + dx, y=self.y + dy, angle=self.angle + turn)

    def lay(self, canvas: Sheet) -> None:
        """Draw the part on a canvas of the photograph's resolution."""
        bilinear = Image.Resampling.BILINEAR
        sheet = self.sheet.reduced().each(lambda x: x.rotate(self.angle, bilinear, expand=True))
        (width, breadth), edge = sheet.cover.size, canvas.cover.width
        x = round(edge / 2 + self.x * canvas.pixels - width / 2)
        y = round(edge / 2 + self.y * canvas.pixels - breadth / 2)
        height = sheet.height
        if self.relief is not None:
            change = ImageChops.add if self.relief > 0 else ImageChops.subtract
            below = canvas.height.crop((x, y, x + width, y + breadth))
            height = change(below, Image.new("L", below.size, abs(self.relief)))
        canvas.colour.paste(sheet.colour, (x, y), sheet.cover)
        canvas.height.paste(height, (x, y), sheet.cover)
        canvas.gloss.paste(sheet.gloss, (x, y), sheet.cover)
        canvas.cover.paste(255, (x, y), sheet.cover)


Parts = dict[str, Part]


def box(x: float, y: float, width: float, breadth: float) -> tuple[float, float, float, float]:
    """The corners of a box of half-size `width` by `breadth` about (x, y)."""
    return (x - width, y - breadth, x + width, y + breadth)


def discs(centres, radius: float) -> list[tuple[float, float, float, float]]:
    """The boxes of equal circles."""
    return [box(x, y, radius, radius) for x, y in centres]


def around(count: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    """`count` points on a circle about the centre."""
    angles = start + np.arange(count) * 2 * pi / count
    return [(radius * cos(angle), radius * sin(angle)) for angle in angles]


def clouds(edge: int, cells: int, rng: Generator) -> np.ndarray:
    """Smooth noise (edge, edge) with standard deviation up to 1 and `cells` blotches per edge."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((edge, edge), Image.Resampling.BICUBIC))


def groove(points: np.ndarray, widths: np.ndarray, size: int, colour: Colour, depth: int) -> Part:
    """A groove along closely spaced points (N, 2) with half-widths (N,)."""
    sheet = Sheet.blank(CANVAS, CANVAS, size, colour)
    sheet.mark("ellipse", [box(*at, w, w) for at, w in zip(points, widths, strict=True)], colour)
    return Part(sheet, relief=-depth)
