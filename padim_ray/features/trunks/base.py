"""What a trunk is: named levels with channels and strides, and how to build it. No PyTorch here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from padim_ray.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Level(NamedTuple):
    """A feature map: its channels, and the side of one of its cells in input pixels."""

    channels: int
    stride: int


FIRST_CONVOLUTION = Level(64, 2)


@dataclass(frozen=True)
class Architecture(ABC):
    """A pretrained CNN that a trunk is taken from.

    Attributes:
        name: as `--backbone` takes it.
        levels: by name, finest first. Every stride is a multiple of the one before.
        default_levels: the levels that are used if the user names none.
        default_features: the number of channels that are kept by default; None keeps all.
        largest: channels and stride of the largest activation, for estimates of memory.
        mean, std: of the pixels' red, green and blue in 0…1, which the network was trained with.
    """

    name: str
    levels: Mapping[str, Level]
    default_levels: tuple[str, ...]
    default_features: int | None = None
    largest: Level = FIRST_CONVOLUTION
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @abstractmethod
    def build(self, levels: Sequence[str]) -> "nn.Sequential":
        """The network up to the deepest of `levels`, whose children named like levels give them.

        Batch norms that follow a convolution are folded into it later. Parameters may be on the
        meta device, where they take no memory before weights are loaded.
        """

    def pretrained(self, weights: str) -> "Mapping[str, torch.Tensor]":
        """The state dict of weights that are known by name.

        Raises:
            ModelError: if there are none of that name, or they can't be downloaded.
        """
        raise ModelError(
            f"{self.name} has no weights named {weights!r}: give --weights the name of a "
            ".pth or .safetensors file"
        )

    def fuse(
        self,
        stages: "nn.Sequential",
        channels: "Mapping[str, torch.Tensor]",
        dtype: "torch.dtype",
        device: "torch.device",
        images: int,
    ) -> "FusedTrunk | None":
        """The same network in fewer passes over memory; None where there is no such form.

        Args:
            stages: built by `build`, with weights, batch norms folded, in float32.
            channels: the kept channels of each used level.
            dtype: to compute in.
            device: to compute on.
            images: per pass.
        """
        return None


@dataclass(frozen=True)
class FusedTrunk:
    """A fused form of a trunk.

    Attributes:
        forward: images (B, 3, H, W), uint8 or float in 0…255, not normalised → per used level
            (B, widths, H_ℓ, W_ℓ).
        widths: channels that come out per level; more than are kept where rows of memory are
            aligned by repeating the last one.
    """

    forward: "Callable[[torch.Tensor], list[torch.Tensor]]"
    widths: tuple[int, ...]
