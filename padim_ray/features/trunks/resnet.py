"""torchvision's ResNets as trunks: their sizes, without importing PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from padim_ray.features.trunks.base import Architecture, FusedTrunk, Level

if TYPE_CHECKING:
    import torch
    from torch import nn

STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
DEFAULT_LEVELS = ("layer1", "layer2", "layer3")
PAPER_FEATURES = 550  # the paper's number for wide_resnet50_2


@dataclass(frozen=True, kw_only=True)
class ResNet(Architecture):
    """A ResNet (He et al. 2016), ResNeXt (Xie et al. 2017) or Wide ResNet (Zagoruyko 2016).

    Attributes:
        blocks: the number of blocks of each level.
        bottleneck: whether a block has three convolutions rather than two.
        groups: of the 3×3 convolutions in bottleneck blocks.
        group_width: channels per group at the first level; it doubles from level to level.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64

    def build(self, levels: Sequence[str]) -> "nn.Sequential":
        from padim_ray.features.trunks.resnet_modules import build_stages

        return build_stages(self, levels)

    def pretrained(self, weights: str) -> "Mapping[str, torch.Tensor]":
        from padim_ray.features.trunks.torchvision_weights import read_torchvision

        return read_torchvision(weights, self.name)

    def fuse(
        self,
        stages: "nn.Sequential",
        channels: "Mapping[str, torch.Tensor]",
        dtype: "torch.dtype",
        device: "torch.device",
        images: int,
    ) -> FusedTrunk | None:
        from padim_ray.features.trunks import resnet_fused

        if not resnet_fused.is_available(device, dtype):
            return None
        fused = resnet_fused.FusedStages(self, stages, channels, dtype, device, images)
        return FusedTrunk(fused, tuple(map(len, fused.channels.values())))


def _resnet(
    name: str,
    blocks: tuple[int, int, int, int],
    *,
    bottleneck: bool = True,
    groups: int = 1,
    group_width: int = 64,
) -> ResNet:
    expansion = 4 if bottleneck else 1
    return ResNet(
        name=name,
        levels={
            level: Level(expansion * 64 * 2**index, stride)
            for index, (level, stride) in enumerate(STRIDES.items())
        },
        default_levels=DEFAULT_LEVELS,
        default_features=PAPER_FEATURES if bottleneck else None,
        blocks=blocks,
        bottleneck=bottleneck,
        groups=groups,
        group_width=group_width,
    )


RESNETS = (
    _resnet("resnet18", (2, 2, 2, 2), bottleneck=False),
    _resnet("resnet34", (3, 4, 6, 3), bottleneck=False),
    _resnet("resnet50", (3, 4, 6, 3)),
    _resnet("resnet101", (3, 4, 23, 3)),
    _resnet("resnet152", (3, 8, 36, 3)),
    _resnet("resnext50_32x4d", (3, 4, 6, 3), groups=32, group_width=4),
    _resnet("resnext101_32x8d", (3, 4, 23, 3), groups=32, group_width=8),
    _resnet("resnext101_64x4d", (3, 4, 23, 3), groups=64, group_width=4),
    _resnet("wide_resnet50_2", (3, 4, 6, 3), group_width=128),
    _resnet("wide_resnet101_2", (3, 4, 23, 3), group_width=128),
)
