"""The product `flange`: a turned metal flange on a belt, its screws and its defects."""

from functools import lru_cache
from math import cos, pi, radians, sin

import numpy as np
from numpy.random import Generator
from PIL import Image

from demo.sheet import CANVAS, INK, Part, Parts, Sheet, around, box, clouds, discs, groove

BOLTS = around(6, 0.29)
# The steps of the turned metal from the outside in: radius, grey level, height, gloss.
STEPS = [(0.435, 140, 110, 130), (0.415, 158, 125, 170), (0.205, 106, 100, 100)]
STEPS += [(0.188, 168, 165, 190), (0.118, 112, 150, 140), (0.105, 30, 0, 0)]


@lru_cache
def base(size: int) -> Sheet:
    """The flange without its screws."""
    sheet = Sheet.blank(CANVAS, CANVAS, size, (50, 51, 54), 0)
    for radius, grey, height, gloss in STEPS:
        sheet.mark("ellipse", [box(0, 0, radius, radius)], (grey,) * 3, height, gloss, 0.005)
    keyway = [box(0, -0.106, 0.022, 0.026)]
    sheet.mark("rectangle", keyway, (30,) * 3, 0, 0)
    sheet.mark("ellipse", discs(BOLTS, 0.064), (120,) * 3, 85, 90)
    holes = (
        discs(BOLTS, 0.036) + discs(around(6, 0.37, pi / 6), 0.014) + discs([(0.24, -0.14)], 0.02)
    )
    sheet.mark("ellipse", holes, INK, 0, 0)
    sheet.write(0, -0.28, "DN 80", 0.056, (78,) * 3, 108)
    sheet.write(0, 0.28, "PN 16", 0.056, (78,) * 3, 108)
    return sheet.reduced()


def texture(edge: int, rng: Generator) -> np.ndarray:
    """Brightness (edge, edge) of turned rings with a fan-shaped highlight, and of the belt."""
    y, x = (np.mgrid[:edge, :edge].astype(np.float32) / edge - 0.5) * CANVAS
    radius, towards = np.hypot(x, y), radians(rng.normal(51, 4))
    rings = rng.standard_normal(400, np.float32)[(radius * 500).astype(int)]
    cosine = (x * cos(towards) + y * sin(towards)) / np.maximum(radius, 0.01)
    turned = 0.82 + 0.4 * cosine**2 * cosine**2 + 0.05 * rings + 0.02 * clouds(edge, 7, rng)
    weft, warp = (np.cos(380 * x[0] + phase) for phase in rng.uniform(0, 2 * pi, 2))
    belt = 1 + 0.1 * (weft[:, None] + warp) + 0.06 * clouds(edge, edge // 2, rng)
    return np.where((radius < 0.435) & (radius > 0.105), turned, belt)


@lru_cache
def parts(size: int) -> Parts:
    """The six screws with hexagonal sockets."""
    sheet, grey = Sheet.blank(0.13, 0.13, size, (104, 105, 108)), (104, 105, 108)
    sheet.mark("ellipse", [box(0, 0, 0.054, 0.054)], grey, 130, 150, 0.005)
    sheet.mark("polygon", [around(6, 0.03)], INK, 50, 0, 0.002)
    return {f"screw {i}": Part(sheet, *at, play=30) for i, at in enumerate(BOLTS)}


def crack(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """A jagged line from the hub towards the rim, between two screws, with a branch."""
    nodes = np.linspace(0.19, 0.435, 16)
    trunk = pi / 6 + pi / 3 * rng.integers(6) + rng.normal(0, 0.045, 16).cumsum()
    branch = trunk + np.maximum(0, np.arange(-5, 11)) * rng.choice([-0.03, 0.03])
    lines = []
    for angles, end in ((trunk, rng.uniform(0.38, 0.435)), (branch, rng.uniform(0.33, 0.38))):
        radii = np.linspace(0.19, end, 300)
        angle = np.interp(radii, nodes, angles)
        points = np.stack([radii * np.cos(angle), radii * np.sin(angle)], 1)
        lines.append(groove(points, np.linspace(0.007, 0.002, 300), size, INK, 60))
    return parts | {"trunk": lines[0], "branch": lines[1]}, lines


def missing_screw(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """One or two screws are missing."""
    lost = rng.choice(list(parts), rng.integers(1, 3), replace=False)
    return {name: parts[name] for name in parts if name not in lost}, [parts[n] for n in lost]


def rust(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """A patch of corrosion, densest in the middle."""
    sheet = Sheet.blank(0.36, 0.36, size, (84, 60, 46))
    edge = sheet.cover.width
    y, x = np.mgrid[-1 : 1 : edge * 1j, -1 : 1 : edge * 1j]
    grown = 1 - np.hypot(x, y) / rng.uniform(0.45, 0.7) + 0.25 * clouds(edge, 8, rng)
    opacity = np.clip(2.5 * grown, 0, 1) * np.clip(0.65 + 0.2 * clouds(edge, 45, rng), 0.3, 1)
    sheet.cover = Image.fromarray((255 * opacity).astype(np.uint8))
    angle = rng.uniform(0, 2 * pi)
    patch = Part(sheet, 0.3 * cos(angle), 0.3 * sin(angle), relief=14)
    return parts | {"rust": patch}, [patch]
