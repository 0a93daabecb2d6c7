"""The product `board`: a printed circuit board, its parts and its defects."""

from dataclasses import replace
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from numpy.random import Generator

from demo.sheet import (
    BLACK,
    CANVAS,
    INK,
    SILVER,
    STEEL,
    Part,
    Parts,
    Sheet,
    box,
    clouds,
    discs,
    groove,
)

GOLD, WHITE, GREEN, TRACE = (214, 178, 92), (222, 226, 218), (22, 84, 52), (38, 112, 70)
PROCESSOR = np.array([-0.09, -0.085])
PINS = np.linspace(-0.105, 0.105, 10)  # along each side of the processor
CORNERS = [(-0.395, -0.395), (0.395, -0.395), (-0.395, 0.395), (0.395, 0.395)]
RESISTORS = [(x, 0.215, 0) for x in np.linspace(-0.3, 0.12, 5)]
RESISTORS += [(-0.375, y, 90) for y in np.linspace(-0.22, 0.11, 4)]


def fan_out() -> list[np.ndarray]:
    """The traces (points, 2) from the processor's pins to their vias."""
    traces = []
    for side in range(4):
        for pin, reach in zip(PINS, [0.205, 0.235] * 5, strict=True):
            across = np.array([pin, pin, pin * 1.3, pin * 1.3])
            trace = (across + 1j * np.array([0.14, 0.18, 0.18 + abs(pin) * 0.3, reach])) * 1j**side
            traces.append(np.stack([trace.real, trace.imag], 1) + PROCESSOR)
    return traces


@lru_cache
def base(size: int) -> Sheet:
    """The bare board on a grey mat: traces, vias, pads and print."""
    sheet = Sheet.blank(CANVAS, CANVAS, size, (92, 95, 100), 0)
    edge, corner = [box(0, 0, 0.465, 0.465)], 0.03 * sheet.pixels
    sheet.mark("rounded_rectangle", edge, GREEN, 45, 60, radius=corner)
    lines = [[(0.12, y), (0.44, y)] for y in np.arange(-0.32, 0.3, 0.045)]
    lines += [[(-0.44, y), (0.2, y)] for y in (0.275, 0.305, 0.335)] + fan_out()
    width = round(0.008 * sheet.pixels)
    sheet.mark("line", lines, TRACE, 51, 60, 0.002, width=width, joint="curve")
    vias = [line[-1] for line in lines]
    sheet.mark("ellipse", discs(vias, 0.0085), GOLD, 52, 150)
    sheet.mark("ellipse", discs(vias, 0.004), INK, 20)
    fingers = [box(x, 0.41, 0.011, 0.04) for x in np.linspace(-0.24, 0.24, 13)]
    sheet.mark("rectangle", fingers, GOLD, 52, 150)
    sheet.mark("ellipse", discs(CORNERS, 0.052), GOLD, 52, 160)
    for number, (x, y, turn) in enumerate(RESISTORS, 1):
        pads = box(x, y, 0.02, 0.043) if turn else box(x, y, 0.043, 0.02)
        label = (x + 0.05, y) if turn else (x, y + 0.042)
        sheet.mark("rectangle", [pads], SILVER, 54, 150)
        sheet.write(*label, f"R{number}", 0.026, WHITE)
    sheet.write(0.0, -0.41, "PD-320  REV C", 0.05, WHITE)
    return sheet.reduced()


def texture(edge: int, rng: Generator) -> np.ndarray:
    """Brightness (edge, edge) of the board's lacquer."""
    return 1 + 0.025 * clouds(edge, 9, rng) + 0.03 * clouds(edge, edge // 2, rng)


def chip(size: int, width: float, breadth: float, pins: list[tuple], text: str) -> Sheet:
    """A black package of half-size `width` by `breadth`."""
    sheet = Sheet.blank(2 * width + 0.08, 2 * breadth + 0.08, size, STEEL)
    sheet.mark("rectangle", pins, SILVER, 72, 150)
    sheet.mark("rectangle", [box(0, 0, width, breadth)], BLACK, 120, 45, 0.005)
    sheet.mark("ellipse", [box(0.026 - width, 0.026 - breadth, 0.011, 0.011)], INK, 108)
    sheet.write(0, 0.01, text, 0.045, STEEL)
    return sheet


def resistor(size: int) -> Sheet:
    """A black body between two tinned ends."""
    sheet = Sheet.blank(0.08, 0.05, size, SILVER)
    sheet.mark("rectangle", [box(0, 0, 0.035, 0.017)], SILVER, 80, 150)
    sheet.mark("rectangle", [box(0, 0, 0.022, 0.018)], BLACK, 84)
    sheet.write(0, 0, "103", 0.026, WHITE)
    return sheet


def capacitor(size: int) -> Sheet:
    """A round can, dark on its negative side, on a square foot."""
    sheet, can = Sheet.blank(0.18, 0.18, size, BLACK), [box(0, 0, 0.07, 0.07)]
    foot = [box(0, 0, 0.08, 0.08)]
    sheet.mark("rounded_rectangle", foot, BLACK, 80, radius=0.02 * sheet.pixels)
    sheet.mark("ellipse", can, SILVER, 200, 120, 0.007)
    sheet.mark("chord", can, (58, 60, 72), start=110, end=250)
    sheet.write(0.02, 0, "100\n25V", 0.034, BLACK)
    return sheet


def screw(size: int) -> Sheet:
    """A screw's head with a cross."""
    sheet = Sheet.blank(0.1, 0.1, size, SILVER)
    sheet.mark("ellipse", [box(0, 0, 0.04, 0.04)], SILVER, 130, 150, 0.005)
    cross = [box(0, 0, 0.025, 0.0055), box(0, 0, 0.0055, 0.025)]
    sheet.mark("rectangle", cross, INK, 60, 0, 0.002)
    return sheet


@lru_cache
def parts(size: int) -> Parts:
    """The parts of a faultless board."""
    rows = [box(pin, 0, 0.006, 0.155) for pin in PINS] + [box(0, pin, 0.155, 0.006) for pin in PINS]
    legs = [box(0, y, 0.085, 0.008) for y in (-0.06, -0.02, 0.02, 0.06)]
    body = chip(size, 0.128, 0.128, rows, "PADIM\nM4-320\n2417 TW")
    small, head = chip(size, 0.058, 0.082, legs, "OP8\n71C"), screw(size)
    parts = {f"screw {i}": Part(head, *at, play=45) for i, at in enumerate(CORNERS)}
    parts |= {f"R{i}": Part(resistor(size), *at) for i, at in enumerate(RESISTORS, 1)}
    return parts | {
        "processor": Part(body, *PROCESSOR, play=0.3),
        "amplifier": Part(small, 0.28, -0.23),
        "driver": Part(small, 0.28, -0.03),
        "capacitor": Part(capacitor(size), 0.28, 0.17),
    }


def bridge(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """Solder joins three to six neighbouring pins of the processor."""
    joined = PINS[rng.integers(4) :][: rng.integers(3, 7)]
    along = np.linspace(joined[0] - 0.008, joined[-1] + 0.008, 30)
    sizes = np.interp(along, PINS, rng.uniform(0.013, 0.025, len(PINS)))
    blobs = [box(x, 0.148, radius, radius) for x, radius in zip(along, sizes, strict=True)]
    sheet = Sheet.blank(0.4, 0.4, size, SILVER)
    sheet.mark("ellipse", blobs, (172, 174, 177), 115, 110, 0.007)
    solder = Part(sheet, *PROCESSOR, angle=90 * rng.integers(4))
    return parts | {"solder": solder}, [solder]


def misplaced(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """A part is shifted and turned; its right and its wrong position both count as defective."""
    name = rng.choice(["amplifier", "driver", "capacitor", "R3", "R8"])
    dx, dy = rng.uniform(0.012, 0.03, 2) * rng.choice([-1, 1], 2)
    right, turn = parts[name], rng.uniform(8, 35) * rng.choice([-1, 1])
    wrong = replace(right, x=right.x + dx, y=right.y + dy, angle=right.angle + turn)
    return parts | {name: wrong}, [right, wrong]


def scratch(parts: Parts, size: int, rng: Generator) -> tuple[Parts, list[Part]]:
    """One to three strokes side by side, down to the bare material."""
    t, way = np.linspace(-0.5, 0.5, 300)[:, None], rng.uniform(0, pi)
    course = rng.uniform(0.3, 0.6) * t * (cos(way), sin(way)) + rng.normal(0, 0.2, 2) * t**2
    course += rng.uniform(-0.18, 0.18, 2)
    strokes = []
    for _ in range(rng.integers(1, 4)):
        widths = rng.uniform(0.004, 0.008) * np.cos(pi * t[:, 0]) ** 0.5 * rng.uniform(0.6, 1, 300)
        points = course + rng.normal(0, 0.012, 2)
        strokes.append(groove(points, widths, size, (196, 190, 160), 22))
    return parts | {f"stroke {i}": stroke for i, stroke in enumerate(strokes)}, strokes
