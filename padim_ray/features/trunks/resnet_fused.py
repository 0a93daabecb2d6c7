"""ResNet trunks with bias, residual and ReLU fused into the convolutions.

oneDNN's and cuDNN's convolutions can add a residual and apply the ReLU themselves. PyTorch has
operators for that, which its compiler and its JIT use. Calling them directly is as fast as compiled
code, without the time to compile. Tests compare with the plain modules.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from padim_ray.features import gpu
from padim_ray.features.bfloat16 import is_bfloat16_faster
from padim_ray.features.channels import select_channels
from padim_ray.features.trunks.resnet import ResNet
from padim_ray.features.trunks.resnet_modules import Block

MIDDLE = 128  # the middle of a pixel's range; subtracting it leaves small integers
ONEDNN = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_reorder_convolution_weight",
)
CUDNN = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators; on GPUs they are for bfloat16 only."""
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
    """Computes the same feature maps as the plain stages, normalisation included.

    Every pass has the same number of images; a smaller one is padded. Kernels are chosen by shape
    and round differently, and an image's features must not depend on the rest of its batch.

    Args:
        resnet: the network.
        stages: conv1, maxpool, layer1, …, with batch norms folded, in float32.
        channels: indices of the kept channels of each used level.
        dtype: type to compute in.
        device: device to compute on.
        images: images per pass.

    Attributes:
        channels: indices of each returned feature map's channels, see `FusedTrunk.widths`.
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
        backend: type[_Convolution] = _CuDnn if device.type == "cuda" else _OneDnn
        convolution = partial(backend, dtype, device)
        first, pixel_channels = stages.get_submodule("conv1"), backend.pixel_channels
        self.first = _FirstLayer(resnet, first, convolution, pixel_channels, images)
        self.max_pool = backend.max_pool
        layers = {
            name: _blocks(layer) for name, layer in stages.named_children() if name in resnet.levels
        }
        self.channels = {
            name: _pad(kept, layers[name][-1], backend.channel_multiple)
            for name, kept in channels.items()
        }
        deepest = list(layers)[-1]
        needed = {}
        if len(self.channels[deepest]):  # the last block computes no other channels
            needed[layers[deepest][-1]] = self.channels[deepest]
            self.channels[deepest] = torch.arange(len(self.channels[deepest]), device=device)
        self.blocks = {
            name: [_Block(block, convolution, needed.get(block)) for block in blocks]
            for name, blocks in layers.items()
        }

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of images (B, 3, H, W), uint8 or float in 0…255, see `FusedTrunk`."""
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


def _blocks(layer: nn.Module) -> list[Block]:
    blocks = []
    for block in layer.children():
        assert isinstance(block, Block)
        blocks.append(block)
    return blocks


def _pad(kept: torch.Tensor, block: Block, multiple: int) -> torch.Tensor:
    """Repeat the last kept channel until their number is a multiple of `multiple`."""
    missing = -len(kept) % multiple
    if not len(kept) or len(kept) + missing >= block.convolutions[-1].out_channels:
        return kept
    return torch.cat([kept, kept[-1:].expand(missing)])


class _Convolution(ABC):
    """A convolution with bias that can also add a residual and apply the ReLU.

    Args:
        dtype: type to compute in.
        device: device to compute on.
        weight: the weights, of any type.
        bias: the bias, of any type.
        like: a convolution of the same padding, stride, dilation and groups.

    Attributes:
        channel_multiple: the number of a feature map's kept channels is padded to a multiple of it.
        pixel_channels: channels of a 2×2 block of pixels in the first layer: 12, and padding.
    """

    channel_multiple: ClassVar[int]
    pixel_channels: ClassVar[int]
    weight: torch.Tensor
    bias: torch.Tensor | None

    @abstractmethod
    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: nn.Conv2d,
    ) -> None: ...

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve."""

    @abstractmethod
    def relu(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve and apply the ReLU."""

    @abstractmethod
    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Convolve, add the residual and apply the ReLU. May overwrite the residual."""

    @staticmethod
    @abstractmethod
    def max_pool(x: torch.Tensor) -> torch.Tensor:
        """Max pooling 3×3, stride 2, padding 1, of channels-last maps that aren't negative."""


class _OneDnn(_Convolution):
    """A convolution on CPUs, with weights packed for oneDNN."""

    channel_multiple = 1
    pixel_channels = 12

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: nn.Conv2d,
    ) -> None:
        self.rounded_to: torch.dtype | None = None
        computed = dtype
        if dtype == torch.bfloat16 and not is_bfloat16_faster():
            # compute in float32 and round: several times as fast as PyTorch's emulated bfloat16
            self.rounded_to, computed = dtype, torch.float32
        self.geometry = [list(like.padding), list(like.stride), list(like.dilation), like.groups]
        self.bias = None if bias is None else bias.to(dtype).to(computed)
        weight = weight.to(dtype).to(computed, memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, "none")

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, "relu")

    def _convolve(self, x: torch.Tensor, then: str) -> torch.Tensor:
        return self._rounded(
            torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, then, [], ""
            )
        )

    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._rounded(
            torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""
            )
        )

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rounded_to is None else x.copy_(x.to(self.rounded_to))

    @staticmethod
    def max_pool(x: torch.Tensor) -> torch.Tensor:
        dtype, x = x.dtype, x.permute(0, 2, 3, 1)
        if dtype == torch.bfloat16:  # as integers, the bits of positive numbers have their order
            x = x.view(torch.int16)
        rows = torch.maximum(x[:, 0::2], x[:, 1::2])
        torch.maximum(rows[:, 1:], x[:, 1:-1:2], out=rows[:, 1:])
        pooled = torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
        torch.maximum(pooled[:, :, 1:], rows[:, :, 1:-1:2], out=pooled[:, :, 1:])
        return pooled.view(dtype).permute(0, 3, 1, 2)


class _CuDnn(_Convolution):
    """A convolution on GPUs."""

    channel_multiple = 16
    pixel_channels = 16  # 12, and 4 zeros for the tensor cores

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: nn.Conv2d,
    ) -> None:
        self.geometry = (like.stride, _padding(like), like.dilation, like.groups)
        self.bias = None if bias is None else bias.to(device, dtype)
        self.weight = weight.to(device, dtype, memory_format=torch.channels_last)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, *self.geometry)

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)

    def add_relu(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *self.geometry
        )

    @staticmethod
    def max_pool(x: torch.Tensor) -> torch.Tensor:
        if gpu.has_kernels(x.device):
            from padim_ray.features.kernels import max_pool

            return max_pool(x)
        return nn.functional.max_pool2d(x, 3, stride=2, padding=1)


def _padding(convolution: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(convolution.padding, str)
    return convolution.padding


class _Block:
    """A residual block.

    Args:
        block: its modules, with batch norms folded.
        convolution: makes a `_Convolution` of a weight, a bias and a module of the same geometry.
        kept: the channels to compute. Default: all.
    """

    def __init__(
        self,
        block: Block,
        convolution: Callable[..., _Convolution],
        kept: torch.Tensor | None = None,
    ) -> None:
        *inner, last = block.convolutions
        self.kept = kept
        self.inner = [convolution(module.weight, module.bias, module) for module in inner]
        weight, bias = last.weight, _bias(last)
        self.shortcut: _Convolution | None = None
        if block.downsample:
            module = block.downsample[0]
            assert isinstance(module, nn.Conv2d)
            self.shortcut = convolution(module.weight, None, module)
            bias = bias + _bias(module)  # the two branches' sum has the biases' sum
        if kept is not None:
            kept = kept.to(weight.device)
            weight, bias = weight[kept], bias[kept]
        self.last = convolution(weight, bias, last)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's kept channels; may overwrite `x`."""
        residual = self.shortcut(x) if self.shortcut else x
        if self.kept is not None:
            residual = select_channels(residual, self.kept)
        for convolution in self.inner:
            x = convolution.relu(x)
        return self.last.add_relu(x, residual)


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    """The bias that folding the batch norm has given the convolution."""
    assert convolution.bias is not None
    return convolution.bias


class _FirstLayer:
    """Normalisation, the 7×7 convolution of stride 2, and ReLU.

    Each block of 2×2 pixels becomes one cell of 12 channels, on which the convolution is 4×4 with
    stride 1: 3 channels would leave most of a vector register unused. The normalisation is folded
    into the weights. That is exact, because the border is filled with the mean pixel, which
    normalisation maps to zero. Only `MIDDLE` is subtracted from the pixels; that leaves integers
    which bfloat16 represents exactly.

    Args:
        resnet: gives the mean and standard deviation of pixels.
        module: the convolution, with the batch norm folded.
        convolution: makes a `_Convolution` of a weight, a bias and a module of the same geometry.
        pixel_channels: channels of a cell: 12, and padding.
        images: images per pass; smaller batches are padded.
    """

    def __init__(
        self,
        resnet: ResNet,
        module: nn.Module,
        convolution: Callable[..., _Convolution],
        pixel_channels: int,
        images: int,
    ) -> None:
        assert isinstance(module, nn.Conv2d)
        mean, std = ((255 * torch.tensor(v)).double() for v in (resnet.mean, resnet.std))
        self.border = (mean - MIDDLE).repeat(4)
        weight = module.weight.double() / std[:, None, None]  # (64, 3, 7, 7)
        bias = _bias(module).double() - (weight * (mean - MIDDLE)[:, None, None]).sum((1, 2, 3))
        # 8×8, starting one pixel earlier; then the rows and columns of blocks become channels
        weight = nn.functional.pad(weight, (1, 0, 1, 0)).unflatten(2, (4, 2)).unflatten(4, (4, 2))
        weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(len(weight), 12, 4, 4)
        like = nn.Conv2d(12, len(weight), 4, device="meta")
        self.convolution = convolution(
            _widen(weight, 1, pixel_channels).float(), bias.float(), like
        )
        self.images = images
        self.buffers = threading.local()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution.relu(self._cells(images))

    def _cells(self, images: torch.Tensor) -> torch.Tensor:
        """Blocks of 2×2 pixels, with a border of two blocks before and one block after."""
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        channels = self.convolution.pixel_channels
        shape = (self.images, rows + 3, columns + 3, channels)
        cells = getattr(self.buffers, "cells", None)
        if cells is None or cells.shape != shape:
            weight, bias = self.convolution.weight, self.convolution.bias
            assert bias is not None
            border = _widen(self.border, 0, channels).to(weight.device, bias.dtype)
            cells = self.buffers.cells = border.expand(shape).clone()
        inside = cells[:, 2:-1, 2:-1]
        pixels = images.permute(0, 2, 3, 1).contiguous()
        if pixels.dtype == torch.uint8:  # as int8, a byte with its first bit flipped is 128 less
            pixels = pixels.bitwise_xor(MIDDLE).view(torch.int8)
        else:
            pixels = pixels - MIDDLE
        pixels = pixels.view(len(images), rows, 2, columns, 6)
        for row in (0, 1):
            inside[: len(images), :, :, 6 * row : 6 * row + 6].copy_(pixels[:, :, row])
        return cells.permute(0, 3, 1, 2)


def _widen(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Pad a dimension with zeros."""
    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)
