"""The interface of trunks: named levels with channels and strides, and how to build the network.

The options of the command line are made from trunks, so this module, and every one that implements
an `Architecture`, must not import PyTorch at its top. `resnet` is an example, and
`tests/features/test_trunks.py` has the smallest one that works.
"""

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
    """A feature map.

    Attributes:
        channels: the number of its channels.
        stride: the side of one of its cells, in input pixels.
    """

    channels: int
    stride: int


FIRST_CONVOLUTION = Level(64, 2)  # a ResNet's: its output is the largest activation


@dataclass(frozen=True)
class Architecture(ABC):
    """A pretrained CNN whose feature maps are used.

    A feature map of stride s must be (H / s, W / s) for every input (H, W) whose sides are
    multiples of the coarsest used level's stride.

    Attributes:
        name: its name in `--backbone` and in model.json.
        levels: the feature maps by name, finest first. Each stride must be a multiple of the one
            before.
        default_levels: the levels that are used by default, finest first.
        default_features: the number of channels that are kept by default; None keeps all.
        largest: channels and stride of the largest activation, for estimates of memory.
        mean: of the red, green and blue of the training images' pixels, in 0…1.
        std: the standard deviation, likewise. `Trunk` subtracts the mean and divides by it.
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
        """Build the network up to the deepest of `levels`.

        Args:
            levels: names of the used levels, in any order.

        Returns:
            Stages that are applied one after the other to normalised images (B, 3, H, W). The
            output of the child with a level's name is that level's feature map. A `BatchNorm2d`
            right after a `Conv2d` of the same parent is folded into it later. Parameters may be on
            the meta device, where they take no memory until weights are loaded; then all must be in
            the state dict.
        """

    def pretrained(self, weights: str) -> "Mapping[str, torch.Tensor]":
        """Read pretrained weights by name, such as "IMAGENET1K_V1". Default: there are none.

        Returns:
            A state dict with at least the tensors of `build`'s network, under the same names.

        Raises:
            ModelError: if there are no weights of that name, or they can't be downloaded.
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
        """Make a faster form of the network. Default: there is none.

        Args:
            stages: from `build`, in float32 on the CPU, with weights, and with batch norms folded.
            channels: indices of the kept channels of each used level, finest first.
            dtype: type to compute in.
            device: device to compute on.
            images: images per pass.

        Returns:
            The fused form, or None if there is none for this type and device.
        """
        return None


@dataclass(frozen=True)
class FusedTrunk:
    """A faster form of a trunk, equal to its modules up to rounding.

    Attributes:
        forward: computes feature maps (B, widths[ℓ], H_ℓ, W_ℓ), finest first, of images
            (B, 3, H, W), uint8 or float in 0…255, which it normalises itself. An image's features
            must not depend on the rest of its batch.
        widths: channels of each returned feature map: the kept ones, in order. Padding may follow,
            to align rows in memory.
    """

    forward: "Callable[[torch.Tensor], list[torch.Tensor]]"
    widths: tuple[int, ...]
