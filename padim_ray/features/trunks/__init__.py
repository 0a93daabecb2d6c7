"""The trunks by name: pretrained CNNs whose feature maps can be used.

To add a trunk, write a module beside these that implements `Architecture`, and add its instances to
`TRUNKS`.
"""

import random
from collections.abc import Sequence
from typing import Final, Literal

from padim_ray.errors import ModelError
from padim_ray.features.trunks.base import Architecture, FusedTrunk, Level
from padim_ray.features.trunks.resnet import RESNETS

__all__ = ["Architecture", "FusedTrunk", "Level", "check_levels", "choose_channels", "find_trunk"]

ALL: Final = "all"
DEFAULT = "resnet18"
TRUNKS: dict[str, Architecture] = {trunk.name: trunk for trunk in (*RESNETS,)}


def find_trunk(name: str) -> Architecture:
    """The trunk of that name.

    Raises:
        ModelError: if it is unknown.
    """
    if name not in TRUNKS:
        raise ModelError(f"Unknown backbone {name!r}; known are {', '.join(TRUNKS)}")
    return TRUNKS[name]


def check_levels(name: str, levels: Sequence[str]) -> Architecture:
    """The trunk of that name, which must have these levels.

    Raises:
        ModelError: if it is unknown or lacks one of the levels, or if there are no levels.
    """
    trunk = find_trunk(name)
    if not levels or any(level not in trunk.levels for level in levels):
        known = ", ".join(trunk.levels)
        raise ModelError(f"Unknown layers {','.join(levels)!r}; choose among {known}")
    return trunk


def choose_channels(
    name: str, levels: Sequence[str], n_features: int | Literal["all"] | None, seed: int
) -> dict[str, list[int]]:
    """Choose the channels to keep at random (PaDiM, section 3.2).

    Args:
        name: the trunk's name.
        levels: the used levels, in any order.
        n_features: the number of kept channels over all levels, or "all". None: the trunk's
            default.
        seed: of the random choice.

    Returns:
        Ascending channel indices of each used level, finest first.

    Raises:
        ModelError: if the trunk or a level is unknown, or the levels haven't as many channels.
    """
    trunk = check_levels(name, levels)
    widths = {level: trunk.levels[level].channels for level in trunk.levels if level in levels}
    total = sum(widths.values())
    if n_features is None:
        n_features = min(trunk.default_features or total, total)
    if n_features == ALL:
        n_features = total
    if not isinstance(n_features, int) or not 1 <= n_features <= total:
        raise ModelError(f"n_features must be between 1 and {total}, or 'all', not {n_features}")
    kept = set(random.Random(seed).sample(range(total), n_features))
    channels: dict[str, list[int]] = {}
    first = 0
    for level, width in widths.items():
        channels[level] = [index for index in range(width) if first + index in kept]
        first += width
    return channels
