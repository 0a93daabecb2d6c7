"""Images and weights to measure with."""

import os
from pathlib import Path

import torch
import torchvision

from demo.archive import draw_archive

DIFFERENT = 40


def many_images(root: Path, count: int) -> None:
    """`count` PNGs of one group below root/board, of 40 different ones: the rest are links."""
    drawn = root.with_name("drawn")
    draw_archive(drawn, train=DIFFERENT, good=1, defective=1)
    originals = sorted((drawn / "board/train/good").iterdir())
    directory = root / "board"
    directory.mkdir(parents=True)
    for number in range(count):
        os.link(originals[number % DIFFERENT], directory / f"{number:06d}.png")


def random_trunk(path: Path) -> str:
    """Save a seeded random ResNet-18."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return str(path)
