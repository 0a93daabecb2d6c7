"""A ResNet trunk on CPUs: what follows a convolution is done while its output is in the cache.

oneDNN's convolutions can add a residual and apply the ReLU themselves; PyTorch offers that through
the operators that its compiler uses. Calling them directly gives the compiler's rate without its
start-up. The plain modules in `trunk` are the reference that tests compare with.
"""

import threading
from collections.abc import Mapping

import torch
from torch import nn

from padim_ray.resnet import Block

TOGETHER = 8  # images: few enough that an activation is read from the cache
OPERATORS = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_reorder_convolution_weight",
)


def is_available() -> bool:
    """Whether this build of PyTorch has the operators."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in OPERATORS
    )


class FusedStages:
    """What the stages of `trunk.Trunk` compute, of images that are not normalised yet.

    Every pass has the same number of images, filled up with others: kernels are chosen by shape
    and round differently, and an image's features shouldn't depend on its company.

    Args:
        stages: conv1, maxpool, layer1, …, with batch norms folded, in float32.
        channels: the kept channels of each used layer.
        mean, std: of the pixels' channels, in 0…255.
        dtype: to compute in.
    """

    def __init__(
        self,
        stages: nn.Sequential,
        channels: Mapping[str, torch.Tensor],
        mean: torch.Tensor,
        std: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.first = _FirstLayer(stages.conv1, mean, std, dtype)
        layers = {
            name: layer for name, layer in stages.named_children() if name.startswith("layer")
        }
        self.channels = dict(channels)
        deepest = list(layers)[-1]
        needed = {}
        if len(channels[deepest]):  # nothing else of the last block
            needed[layers[deepest][-1]] = channels[deepest]
            self.channels[deepest] = torch.arange(len(channels[deepest]))
        self.blocks = {
            name: [_Block(block, dtype, needed.get(block)) for block in layer]
            for name, layer in layers.items()
        }

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W), uint8 or float in 0…255 → per level (B, c_ℓ, H_ℓ, W_ℓ)."""
        features = [self._run(part) for part in images.split(TOGETHER)]
        return (
            features[0]
            if len(features) == 1
            else [torch.cat(parts) for parts in zip(*features, strict=True)]
        )

    def _run(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(images)
        features = []
        for name, blocks in self.blocks.items():
            for block in blocks:
                x = block(x)
            if name in self.channels:
                features.append(select_channels(x, self.channels[name])[: len(images)])
        return features


def select_channels(features: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, len(kept), H, W), channels-last; as they are, if all are kept."""
    if len(kept) == features.shape[1]:
        return features
    return features.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)


class _Convolution:
    """A convolution with packed weights, and what follows it."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Conv2d, dtype: torch.dtype
    ) -> None:
        self.geometry = [list(like.padding), list(like.stride), list(like.dilation), like.groups]
        self.bias = None if bias is None else bias.to(dtype)
        weight = weight.to(dtype, memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, None)

    @classmethod
    def of(cls, module: nn.Conv2d, dtype: torch.dtype) -> "_Convolution":
        return cls(module.weight, module.bias, module, dtype)

    def __call__(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        """Convolve, then do nothing or "relu"."""
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, then, [], ""
        )

    def add_to_(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Convolve, add the residual in its place, and apply the ReLU."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""
        )


class _Block:
    """A block of the ResNet, of which only the `kept` channels are needed."""

    def __init__(self, block: Block, dtype: torch.dtype, kept: torch.Tensor | None = None) -> None:
        *inner, last = block.convolutions
        self.kept = kept
        self.inner = [_Convolution.of(convolution, dtype) for convolution in inner]
        weight, bias = last.weight, last.bias
        if kept is not None:
            weight, bias = weight[kept], bias[kept]
        self.last = _Convolution(weight, bias, last, dtype)
        self.shortcut = block.downsample and _Convolution.of(block.downsample[0], dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """May overwrite `x`."""
        residual = self.shortcut(x) if self.shortcut else x
        if self.kept is not None:
            residual = select_channels(residual, self.kept)
        for convolution in self.inner:
            x = convolution(x, "relu")
        return self.last.add_to_(residual, x)


class _FirstLayer:
    """Normalisation, the 7×7 convolution of stride 2, ReLU and max pooling.

    Pixels in blocks of 2×2 are one cell of 12 channels, on which the convolution is a 4×4 one of
    stride 1: 3 channels would leave most of a vector unused. The normalisation is part of the
    weights, exactly, since the border is filled with what normalisation makes zero. Only a whole
    number is subtracted from pixels before, which bfloat16 represents exactly.
    """

    def __init__(
        self, convolution: nn.Conv2d, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
    ) -> None:
        mean, std = mean.flatten().double(), std.flatten().double()
        self.shift = round(float(mean.mean()))
        self.border = (mean - self.shift).to(dtype)
        weight = convolution.weight.double() / std[:, None, None]  # (64, 3, 7, 7)
        bias = convolution.bias.double() - (weight * (mean - self.shift)[:, None, None]).sum(
            (1, 2, 3)
        )
        # 8×8, beginning one pixel earlier; then rows and columns within blocks become channels
        weight = nn.functional.pad(weight, (1, 0, 1, 0)).unflatten(2, (4, 2)).unflatten(4, (4, 2))
        weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(len(weight), 12, 4, 4)
        like = nn.Conv2d(12, len(weight), 4, device="meta")
        self.convolution = _Convolution(weight.float(), bias.float(), like, dtype)
        self.dtype = dtype
        self.buffers = threading.local()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return _max_pool(self.convolution(self._cells(images), "relu"))

    def _cells(self, images: torch.Tensor) -> torch.Tensor:
        """Blocks of 2×2 pixels, with a border of two blocks before and one after."""
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        shape = (TOGETHER, rows + 3, columns + 3, 12)
        cells = getattr(self.buffers, "cells", None)
        if cells is None or cells.shape != shape:
            cells = self.buffers.cells = self.border.repeat(4).expand(shape).clone()
        inside = cells[:, 2:-1, 2:-1]
        pixels = images.permute(0, 2, 3, 1).contiguous().view(len(images), rows, 2, columns, 6)
        for row in (0, 1):
            half = inside[: len(images), :, :, 6 * row : 6 * row + 6]
            half.copy_(pixels[:, :, row]).sub_(self.shift)
        return cells.permute(0, 3, 1, 2)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    """3×3 of stride 2 with padding 1, of values that are not negative: rows, then columns."""
    x = x.permute(0, 2, 3, 1)
    rows = torch.maximum(x[:, 0::2], x[:, 1::2])
    torch.maximum(rows[:, 1:], x[:, 1:-1:2], out=rows[:, 1:])
    pooled = torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
    torch.maximum(pooled[:, :, 1:], rows[:, :, 1:-1:2], out=pooled[:, :, 1:])
    return pooled.permute(0, 3, 1, 2)
