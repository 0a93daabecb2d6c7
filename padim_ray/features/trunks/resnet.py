"""The ResNets that a trunk is taken from, with torchvision's names, so that its weights fit.

They are written out here because importing torchvision loads PyTorch's compiler as well: two
seconds and 170 MB in every process that computes. Tests compare all of them with torchvision's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


@dataclass(frozen=True)
class Backbone:
    """A ResNet (He et al. 2016), ResNeXt (Xie et al. 2017) or Wide ResNet (Zagoruyko 2016).

    `blocks`: of each layer. `groups` and `group_width`: of the 3×3 convolutions in `bottleneck`
    blocks of the first layer; later layers double the width.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64

    @property
    def channels(self) -> dict[str, int]:
        """Output channels of each layer."""
        expansion = 4 if self.bottleneck else 1
        return {layer: expansion * 64 * 2**index for index, layer in enumerate(STRIDES)}


BACKBONES = {
    "resnet18": Backbone((2, 2, 2, 2), bottleneck=False),
    "resnet34": Backbone((3, 4, 6, 3), bottleneck=False),
    "resnet50": Backbone((3, 4, 6, 3)),
    "resnet101": Backbone((3, 4, 23, 3)),
    "resnet152": Backbone((3, 8, 36, 3)),
    "resnext50_32x4d": Backbone((3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": Backbone((3, 4, 23, 3), groups=32, group_width=8),
    "resnext101_64x4d": Backbone((3, 4, 23, 3), groups=64, group_width=4),
    "wide_resnet50_2": Backbone((3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": Backbone((3, 4, 23, 3), group_width=128),
}


def build(name: str, layers: Sequence[str]) -> nn.Sequential:
    """A backbone's stages up to the deepest of `layers`: conv1, bn1, relu, maxpool, layer1, ….

    Parameters are on the meta device: they take no memory before weights are loaded.
    """
    backbone = BACKBONES[name]
    deepest = max(layers, key=STRIDES.__getitem__)
    with torch.device("meta"):
        stages = nn.Sequential()
        stages.add_module("conv1", nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False))
        stages.add_module("bn1", nn.BatchNorm2d(64))
        stages.add_module("relu", nn.ReLU(inplace=True))
        stages.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        inputs = 64
        for index, (layer, outputs) in enumerate(backbone.channels.items()):
            blocks = nn.Sequential()
            for number in range(backbone.blocks[index]):
                stride = 2 if index and number == 0 else 1
                width = backbone.groups * backbone.group_width * 2**index
                blocks.append(Block(inputs, width, outputs, stride, backbone))
                inputs = outputs
            stages.add_module(layer, blocks)
            if layer == deepest:
                break
    return stages


class Block(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3 and 1×1 (bottleneck), and what goes past them."""

    def __init__(
        self, inputs: int, width: int, outputs: int, stride: int, backbone: Backbone
    ) -> None:
        super().__init__()
        if backbone.bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(
                width, width, 3, stride, padding=1, groups=backbone.groups, bias=False
            )
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv3 = self.bn3 = None
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """In their order."""
        return [conv for conv in (self.conv1, self.conv2, self.conv3) if conv is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        residual = self.downsample(x) if self.downsample else x
        x = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        if self.conv3 is not None:
            x = self.bn3(self.conv3(torch.relu_(x)))
        return torch.relu_(x.add_(residual))
