"""ResNet trunks with bias, residual and ReLU fused into the convolutions.

oneDNN's and cuDNN's convolutions can add a residual and apply the ReLU themselves; PyTorch offers
that through the operators that its compiler and its JIT use. Calling them directly gives the
compiler's rate without its start-up. Tests compare with the plain modules.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from padim_ray.features import gpu
from padim_ray.features.channels import select_channels
from padim_ray.features.trunks.resnet import ResNet
from padim_ray.features.trunks.resnet_modules import Block

MIDDLE = 128  # the middle of a pixel's range: subtracted, it leaves small whole numbers
ONEDNN = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
)
CUDNN = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators for this device; GPUs': bfloat16 only."""
    if device.type == "cuda":
        return (
            dtype == torch.bfloat16
            and torch.backends.cudnn.is_available()
            and all(hasattr(torch, name) for name in CUDNN)
        )
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)
    )


class FusedStages:
    """Images that are not normalised yet → features, as the plain stages compute them.

    Every pass has the same number of images, padded with others: kernels are chosen by shape and
    round differently, and an image's features mustn't depend on the rest of the batch.

    Args:
        resnet: the network.
        stages: conv1, maxpool, layer1, …, with batch norms folded, in float32.
        channels: the kept channels of each used level.
        dtype: to compute in.
        device: where to compute.
        images: per pass.

    `channels`: those that come out per level, see `FusedTrunk.widths`.
    """

    def __init__(
        self,
        resnet: ResNet,
        stages: nn.Sequential,
        channels: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        images: int,
    ) -> None:
        self.images, self.dtype = images, dtype
        backend = _CuDnn if device.type == "cuda" else _OneDnn
        convolution = partial(backend, dtype, device)
        self.first = _FirstLayer(resnet, stages.get_submodule("conv1"), convolution, images)
        self.max_pool = backend.max_pool
        layers = {name: layer for name, layer in stages.named_children() if name in resnet.levels}
        self.channels = {
            name: _fill_up(kept, layers[name][-1], backend.row) for name, kept in channels.items()
        }
        deepest = list(layers)[-1]
        needed = {}
        if len(self.channels[deepest]):  # the other channels of the last block aren't computed
            needed[layers[deepest][-1]] = self.channels[deepest]
            self.channels[deepest] = torch.arange(len(self.channels[deepest]), device=device)
        self.blocks = {
            name: [_Block(block, convolution, needed.get(block)) for block in layer]
            for name, layer in layers.items()
        }

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W), uint8 or float in 0…255 → per level (B, c_ℓ, H_ℓ, W_ℓ)."""
        features = [self._run(part) for part in images.split(self.images)]
        return (
            features[0]
            if len(features) == 1
            else [torch.cat(parts) for parts in zip(*features, strict=True)]
        )

    def _run(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.max_pool(self.first(images))
        features = []
        for name, blocks in self.blocks.items():
            for block in blocks:
                x = block(x)
            if name in self.channels:
                level = select_channels(x, self.channels[name])[: len(images)]
                features.append(level.to(self.dtype))
        return features


def _fill_up(kept: torch.Tensor, block: Block, row: int) -> torch.Tensor:
    """The kept channels, and the last one again until rows of memory are aligned."""
    missing = -len(kept) % row
    if not len(kept) or len(kept) + missing >= block.convolutions[-1].out_channels:
        return kept
    return torch.cat([kept, kept[-1:].expand(missing)])


class _OneDnn:
    """A convolution on CPUs, with packed weights, and what follows it."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: nn.Conv2d,
    ) -> None:
        self.rounded_to = None
        computed = dtype
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # PyTorch's own emulation takes several times as long as rounding float32 results
            self.rounded_to, computed = dtype, torch.float32
        self.geometry = [list(like.padding), list(like.stride), list(like.dilation), like.groups]
        self.bias = None if bias is None else bias.to(dtype).to(computed)
        weight = weight.to(dtype).to(computed, memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, "none")

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, and apply the ReLU."""
        return self._convolve(x, "relu")

    def _convolve(self, x: torch.Tensor, then: str) -> torch.Tensor:
        return self._rounded(
            torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, then, [], ""
            )
        )

    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Convolve, add the residual (in its place), and apply the ReLU."""
        return self._rounded(
            torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""
            )
        )

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rounded_to is None else x.copy_(x.to(self.rounded_to))

    @staticmethod
    def max_pool(x: torch.Tensor) -> torch.Tensor:
        """3×3 of stride 2 with padding 1, of values that are not negative: rows, then columns."""
        dtype, x = x.dtype, x.permute(0, 2, 3, 1)
        if dtype == torch.bfloat16:  # their bits, as whole numbers, have the same order
            x = x.view(torch.int16)
        rows = torch.maximum(x[:, 0::2], x[:, 1::2])
        torch.maximum(rows[:, 1:], x[:, 1:-1:2], out=rows[:, 1:])
        pooled = torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
        torch.maximum(pooled[:, :, 1:], rows[:, :, 1:-1:2], out=pooled[:, :, 1:])
        return pooled.view(dtype).permute(0, 3, 1, 2)

    row = 1
    """Channels of which a level must have a multiple."""
    pixel_channels = 12
    """Of the first layer's blocks: 2×2 pixels of red, green and blue."""


class _CuDnn:
    """The same on GPUs."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: nn.Conv2d,
    ) -> None:
        self.geometry = [list(like.stride), list(like.padding), list(like.dilation), like.groups]
        self.bias = None if bias is None else bias.to(device, dtype)
        self.weight = weight.to(device, dtype, memory_format=torch.channels_last)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, *self.geometry)

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, and apply the ReLU."""
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)

    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Convolve, add the residual, and apply the ReLU."""
        return torch.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *self.geometry
        )

    @staticmethod
    def max_pool(x: torch.Tensor) -> torch.Tensor:
        """3×3 of stride 2 with padding 1, of values that are not negative, channels-last."""
        if gpu.has_kernels(x.device):
            from padim_ray.features.kernels import max_pool

            return max_pool(x)
        return nn.functional.max_pool2d(x, 3, stride=2, padding=1)

    row = 16
    pixel_channels = 16
    """Of the first layer's blocks: 12, and 4 of zeros, for the tensor cores."""


Convolution = _OneDnn | _CuDnn
"""What computes it; made of a weight, a bias or None, and a module of the same geometry."""


class _Block:
    """A block of the ResNet, of which only the `kept` channels are needed."""

    def __init__(
        self,
        block: Block,
        convolution: Callable[..., Convolution],
        kept: torch.Tensor | None = None,
    ) -> None:
        *inner, last = block.convolutions
        self.kept = kept
        self.inner = [convolution(module.weight, module.bias, module) for module in inner]
        weight, bias = last.weight, last.bias
        self.shortcut = None
        if block.downsample:
            module = block.downsample[0]
            self.shortcut = convolution(module.weight, None, module)
            bias = bias + module.bias  # they are added in any case
        if kept is not None:
            kept = kept.to(weight.device)
            weight, bias = weight[kept], bias[kept]
        self.last = convolution(weight, bias, last)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """May overwrite `x`."""
        residual = self.shortcut(x) if self.shortcut else x
        if self.kept is not None:
            residual = select_channels(residual, self.kept)
        for convolution in self.inner:
            x = convolution.relu(x)
        return self.last.add_relu(x, residual)


class _FirstLayer:
    """Normalisation, the 7×7 convolution of stride 2, and ReLU.

    Pixels in blocks of 2×2 are one cell of 12 channels, on which the convolution is a 4×4 one of
    stride 1: 3 channels would leave most of a vector unused. The normalisation is part of the
    weights, exactly, since the border is filled with what normalisation makes zero. Only the middle
    is subtracted from pixels before; that leaves whole numbers, which bfloat16 represents exactly.
    """

    def __init__(
        self,
        resnet: ResNet,
        module: nn.Module,
        convolution: "partial[Convolution]",
        images: int,
    ) -> None:
        assert isinstance(module, nn.Conv2d)
        mean, std = ((255 * torch.tensor(v)).double() for v in (resnet.mean, resnet.std))
        self.border = (mean - MIDDLE).repeat(4)
        weight = module.weight.double() / std[:, None, None]  # (64, 3, 7, 7)
        bias = module.bias.double() - (weight * (mean - MIDDLE)[:, None, None]).sum((1, 2, 3))
        # 8×8, beginning one pixel earlier; then rows and columns within blocks become channels
        weight = nn.functional.pad(weight, (1, 0, 1, 0)).unflatten(2, (4, 2)).unflatten(4, (4, 2))
        weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(len(weight), 12, 4, 4)
        like = nn.Conv2d(12, len(weight), 4, device="meta")
        self.convolution = convolution(
            _widen(weight, 1, convolution.func.pixel_channels).float(), bias.float(), like
        )
        self.images = images
        self.buffers = threading.local()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution.relu(self._cells(images))

    def _cells(self, images: torch.Tensor) -> torch.Tensor:
        """Blocks of 2×2 pixels, with a border of two blocks before and one after."""
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        channels = self.convolution.pixel_channels
        shape = (self.images, rows + 3, columns + 3, channels)
        cells = getattr(self.buffers, "cells", None)
        if cells is None or cells.shape != shape:
            weight = self.convolution.weight
            border = _widen(self.border, 0, channels).to(weight.device, self.convolution.bias.dtype)
            cells = self.buffers.cells = border.expand(shape).clone()
        inside = cells[:, 2:-1, 2:-1]
        pixels = images.permute(0, 2, 3, 1).contiguous()
        if pixels.dtype == torch.uint8:  # a byte whose first bit is flipped is 128 less, signed
            pixels = pixels.bitwise_xor(MIDDLE).view(torch.int8)
        else:
            pixels = pixels - MIDDLE
        pixels = pixels.view(len(images), rows, 2, columns, 6)
        for row in (0, 1):
            inside[: len(images), :, :, 6 * row : 6 * row + 6].copy_(pixels[:, :, row])
        return cells.permute(0, 3, 1, 2)


def _widen(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Fill up a dimension with zeros."""
    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)
