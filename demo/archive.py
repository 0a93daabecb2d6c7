"""A synthetic archive of product photographs with known defects, in the MVTec AD layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from demo import board, flange
from demo.camera import exposed, lit, posed
from demo.sheet import BLACK, CANVAS, Part, Parts, Sheet

MASK_THRESHOLD = 64  # of 255: a pixel counts as defective from this coverage on

Flaw = Callable[[Parts, int, Generator], tuple[Parts, list[Part]]]


@dataclass(frozen=True)
class Group:
    """A product: functions that draw its base, texture and parts, its defects, its file format.

    A defect takes the parts, the photograph's edge in pixels and a random generator. It returns the
    parts of the defective product, and the parts (present or missing) that cover the defect.
    """

    base: Callable[[int], Sheet]
    texture: Callable[[int, Generator], np.ndarray]
    parts: Callable[[int], Parts]
    defects: dict[str, Flaw]
    mode: str
    suffix: str


BOARD_DEFECTS = {
    "bridge": board.bridge,
    "misplaced": board.misplaced,
    "scratch": board.scratch,
}
FLANGE_DEFECTS = {
    "crack": flange.crack,
    "missing_screw": flange.missing_screw,
    "rust": flange.rust,
}
GROUPS = {
    "board": Group(board.base, board.texture, board.parts, BOARD_DEFECTS, "RGB", ".png"),
    "flange": Group(flange.base, flange.texture, flange.parts, FLANGE_DEFECTS, "L", ".jpg"),
}


def photograph(
    group: Group, size: int, rng: Generator, flaw: Flaw | None = None
) -> tuple[Image.Image, Image.Image]:
    """Draw a photograph of a product and its mask, which is 255 where defective and 0 elsewhere."""
    parts, flawed = {name: part.settled(rng) for name, part in group.parts(size).items()}, []
    if flaw:
        parts, flawed = flaw(parts, size, rng)
    product = group.base(size).each(Image.Image.copy)
    texture = group.texture(product.cover.width, rng)[..., None]
    product.colour = Image.fromarray(np.clip(product.colour * texture, 0, 255).astype(np.uint8))
    defect = Sheet.blank(CANVAS, CANVAS, size, BLACK).reduced()
    for sheet, laid in ((product, parts.values()), (defect, flawed)):
        for part in laid:
            part.lay(sheet)
    pose = (size, rng.uniform(-0.8, 0.8), *rng.uniform(-0.004, 0.004, 2) * size)
    mask = posed(defect.cover, *pose).point([255 * (x >= MASK_THRESHOLD) for x in range(256)])
    return exposed(posed(lit(product).convert(group.mode), *pose), rng), mask


def draw_archive(
    root: Path,
    *,
    train: int = 60,
    good: int = 20,
    defective: int = 8,
    size: int = 320,
    seed: int = 0,
) -> None:
    """Draw every group of `GROUPS` below `root`; the same `seed` draws the same archive.

    `board` is saved as RGB PNG, `flange` as greyscale JPEG. Masks are 8-bit PNG of the
    photograph's size, 0 or 255, at `{group}/ground_truth/{defect}/{number}_mask.png`.

    Args:
        root: the archive's folder, created if it does not exist.
        train: defect-free photographs to train on, per group.
        good: defect-free photographs to test on, per group.
        defective: photographs to test on, per kind of defect.
        size: edge of the square photographs, in pixels.
        seed: seed of all random numbers.
    """
    for group_index, (name, group) in enumerate(GROUPS.items()):
        folders = [("train/good", None, train), ("test/good", None, good)]
        folders += [(f"test/{kind}", flaw, defective) for kind, flaw in group.defects.items()]
        for folder_index, (folder, flaw, count) in enumerate(folders):
            for index in range(count):
                rng = np.random.default_rng([seed, group_index, folder_index, index])
                image, mask = photograph(group, size, rng, flaw)
                save(image, root / name / folder / f"{index:03d}{group.suffix}")
                if flaw:
                    truth = root / name / folder.replace("test", "ground_truth")
                    save(mask, truth / f"{index:03d}_mask.png")


def save(image: Image.Image, path: Path) -> None:
    """Save an image and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, compress_level=1)  # higher levels do not shrink noise
