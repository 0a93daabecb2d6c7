"""The pretrained CNNs that a trunk can be taken from, by name.

A new trunk is a file beside these that makes an `Architecture`, and a line in `TRUNKS`.
"""

import random
from collections.abc import Sequence
from typing import Literal

from padim_ray.errors import ModelError
from padim_ray.features.trunks.base import Architecture, FusedTrunk, Level
from padim_ray.features.trunks.resnet import RESNETS

__all__ = ["Architecture", "FusedTrunk", "Level", "check_levels", "choose_channels", "find_trunk"]

ALL = "all"
DEFAULT = "resnet18"
TRUNKS: dict[str, Architecture] = {each.name: each for each in (*RESNETS,)}


def find_trunk(name: str) -> Architecture:
    """Raises: ModelError for an unknown name."""
    if name not in TRUNKS:
        raise ModelError(f"Unknown backbone {name!r}; known are {', '.join(TRUNKS)}")
    return TRUNKS[name]


def check_levels(name: str, levels: Sequence[str]) -> Architecture:
    """The trunk of that name.

    Raises:
        ModelError: if it is unknown, or lacks one of the levels.
    """
    trunk = find_trunk(name)
    if not levels or any(level not in trunk.levels for level in levels):
        known = ", ".join(trunk.levels)
        raise ModelError(f"Unknown layers {','.join(levels)!r}; choose among {known}")
    return trunk


def choose_channels(
    name: str, levels: Sequence[str], n_features: int | Literal["all"] | None, seed: int
) -> dict[str, list[int]]:
    """The kept channels of each level, finest first (PaDiM's random reduction, section 3.2).

    Args:
        name: the trunk's.
        levels: those that are used.
        n_features: how many in all levels together, drawn by `seed`, or "all". None: the trunk's
            default.

    Raises:
        ModelError: for an unknown trunk or level, or a number that can't be kept.
    """
    trunk = check_levels(name, levels)
    widths = {level: trunk.levels[level].channels for level in trunk.levels if level in levels}
    total = sum(widths.values())
    if n_features is None:
        n_features = min(trunk.default_features or total, total)
    if n_features == ALL:
        n_features = total
    if not 1 <= n_features <= total:
        raise ModelError(f"n_features must be between 1 and {total}, or 'all', not {n_features}")
    kept = set(random.Random(seed).sample(range(total), n_features))
    channels, first = {}, 0
    for level, width in widths.items():
        channels[level] = [index for index in range(width) if first + index in kept]
        first += width
    return channels
