"""The modules of torchvision's ResNets, with the same names, so that its weights fit.

They are copied because importing torchvision also loads PyTorch's compiler, which takes 2 seconds
and 170 MB in every process that computes. Tests compare all of them with torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import nn

from padim_ray.features.trunks.resnet import ResNet


def build_stages(resnet: ResNet, levels: Sequence[str]) -> nn.Sequential:
    """The stages up to the deepest of `levels`: conv1, bn1, relu, maxpool, layer1, …

    Parameters are on the meta device: they take no memory until weights are loaded.
    """
    deepest = max(levels, key=list(resnet.levels).index)
    with torch.device("meta"):
        stages = nn.Sequential()
        stages.add_module("conv1", nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False))
        stages.add_module("bn1", nn.BatchNorm2d(64))
        stages.add_module("relu", nn.ReLU(inplace=True))
        stages.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        inputs = 64
        for index, (name, level) in enumerate(resnet.levels.items()):
            blocks = nn.Sequential()
            for number in range(resnet.blocks[index]):
                stride = 2 if index and number == 0 else 1
                width = resnet.groups * resnet.group_width * 2**index
                blocks.append(Block(inputs, width, level.channels, stride, resnet))
                inputs = level.channels
            stages.add_module(name, blocks)
            if name == deepest:
                break
    return stages


class Block(nn.Module):
    """A residual block of two 3×3 convolutions, or of 1×1, 3×3 and 1×1 (bottleneck)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, resnet: ResNet) -> None:
        super().__init__()
        self.conv3: nn.Conv2d | None = None
        self.bn3: nn.BatchNorm2d | None = None
        if resnet.bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(
                width, width, 3, stride, padding=1, groups=resnet.groups, bias=False
            )
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The convolutions of the residual branch, in order."""
        return [conv for conv in (self.conv1, self.conv2, self.conv3) if conv is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        residual = self.downsample(x) if self.downsample else x
        x = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        if self.conv3 is not None and self.bn3 is not None:
            x = self.bn3(self.conv3(torch.relu_(x)))
        return torch.relu_(x.add_(residual))
