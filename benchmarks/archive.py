"""Images and weights for the benchmarks."""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

DISTINCT = 40  # images; all others are hard links to them
ARCHIVES = {"JPEG 700²": (700, "RGB", "JPEG"), "PNG grey 1024²": (1024, "L", "PNG")}


def draw(seed: int, size: int, mode: str, kind: str) -> bytes:
    """Draw one encoded image: a smooth structure that all images share, plus its own noise."""
    structure = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    smooth = Image.fromarray(structure).resize((size, size), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, (size, size, 3))
    image = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    quality = {"quality": 90} if kind in ("JPEG", "WEBP") else {}
    image.convert(mode).save(buffer, kind, **quality)
    return buffer.getvalue()


def many_images(directory: Path, count: int, size: int, mode: str, kind: str) -> list[Path]:
    """Write `count` images, 40 distinct ones and hard links to them."""
    directory.mkdir(parents=True)
    files = [directory / f"{number:06d}.{kind.lower()}" for number in range(count)]
    for number, file in enumerate(files):
        if number < DISTINCT:
            file.write_bytes(draw(number, size, mode, kind))
        else:
            os.link(files[number % DISTINCT], file)
    return files


def random_trunk(path: Path, backbone: str = "resnet18") -> str:
    """Save the weights of a seeded random trunk and return the path."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(backbone).state_dict(), path)
    return str(path)
