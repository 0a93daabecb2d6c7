"""Images and weights to measure with."""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

DIFFERENT = 40
ARCHIVES = {"JPEG 700²": (700, "RGB", "JPEG"), "PNG grey 1024²": (1024, "L", "PNG")}


def draw(seed: int, size: int, mode: str, kind: str) -> bytes:
    """One encoded image: smooth structure, which all have, with its own sensor noise."""
    structure = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    smooth = Image.fromarray(structure).resize((size, size), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, (size, size, 3))
    image = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    quality = {"quality": 90} if kind in ("JPEG", "WEBP") else {}
    image.convert(mode).save(buffer, kind, **quality)
    return buffer.getvalue()


def many_images(directory: Path, count: int, size: int, mode: str, kind: str) -> list[Path]:
    """`count` images, of 40 different ones: the rest are links."""
    directory.mkdir(parents=True)
    files = [directory / f"{number:06d}.{kind.lower()}" for number in range(count)]
    for number, file in enumerate(files):
        if number < DIFFERENT:
            file.write_bytes(draw(number, size, mode, kind))
        else:
            os.link(files[number % DIFFERENT], file)
    return files


def random_trunk(path: Path, backbone: str = "resnet18") -> str:
    """Save a seeded random trunk."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(backbone).state_dict(), path)
    return str(path)
