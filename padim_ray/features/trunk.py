"""The trunk: a pretrained CNN up to its deepest used level."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from padim_ray.features.bfloat16 import is_bfloat16_faster
from padim_ray.features.channels import select_channels
from padim_ray.features.trunks import FusedTrunk, find_trunk
from padim_ray.features.weights import StateDict, load_state_dict

CPU_PASS = 4  # images per pass; with more, activations don't stay in the cache
GPU_PASS = 256  # images per pass; with fewer, launching kernels takes longer than computing

Precision = Literal["float32", "bfloat16"]


class Trunk(nn.Module):
    """Computes the kept channels of each used level's feature map.

    Batch norms are folded into the convolutions, and tensors are channels-last.

    Args:
        name: a key of `TRUNKS`.
        channels: indices of the kept channels of each used level, finest first.
        state_dict: the weights.
        precision: precision to compute in.
        device: device to compute on.
        fuse: use the trunk's fused form if it has one that works here.
        pass_size: images per pass of the fused form. Default: as many as suit the device.

    Attributes:
        dtype: of the feature maps.
        widths: channels of each returned feature map. In bfloat16 on GPUs the last kept channel is
            repeated until their number is a multiple of 16.

    Raises:
        ModelError: if the trunk is unknown, or the weights don't fit it.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        name: str,
        channels: Mapping[str, Sequence[int]],
        state_dict: StateDict,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        fuse: bool = True,
        pass_size: int | None = None,
    ) -> None:
        super().__init__()
        architecture, device = find_trunk(name), torch.device(device)
        stages = architecture.build(tuple(channels))
        load_state_dict(stages, state_dict)
        _fold_batch_norms(stages)
        stages.requires_grad_(False).eval()
        self.dtype: torch.dtype = getattr(torch, precision)
        self.channels = {
            level: torch.tensor(indices, dtype=torch.int64, device=device)
            for level, indices in channels.items()
        }
        for part in ("mean", "std"):
            pixels = 255 * torch.tensor(getattr(architecture, part), device=device)
            self.register_buffer(part, pixels[:, None, None], persistent=False)
        # either the fused form or the modules
        self.fused: FusedTrunk | None = None
        self.stages: nn.Sequential | None = None
        if fuse:
            size = pass_size or (GPU_PASS if device.type == "cuda" else CPU_PASS)
            self.fused = architecture.fuse(stages, self.channels, self.dtype, device, size)
        if self.fused:
            self.widths = list(self.fused.widths)
        else:
            self.stages = stages.to(device, self.dtype).to(memory_format=torch.channels_last)
            self.widths = [len(kept) for kept in self.channels.values()]

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, widths[ℓ], H_ℓ, W_ℓ) of images (B, 3, H, W) in 0…255, finest first."""
        if self.fused:
            return self.fused.forward(images)
        if len(images) == 1:
            # PyTorch has other kernels for a single image, which round differently
            return [level[:1] for level in self(images.expand(2, -1, -1, -1))]
        # by default GPUs round a float32 convolution's inputs to TF32. `flags` switches off
        # everything that isn't named, even cuDNN itself
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.compute(images)

    def compute(self, images: torch.Tensor) -> list[torch.Tensor]:
        """As `forward`, by PyTorch's modules; only if there is no fused form."""
        assert self.stages is not None
        x = (images - self.mean) / self.std
        x = x.to(self.dtype, memory_format=torch.channels_last)
        features = []
        for name, stage in self.stages.named_children():
            x = stage(x)
            if name in self.channels:
                features.append(select_channels(x, self.channels[name]))
        return features


def _fold_batch_norms(module: nn.Module) -> None:
    """Replace each convolution and the batch norm that follows it by one convolution."""
    module.eval()
    previous = ""
    for name, child in list(module.named_children()):
        convolution = getattr(module, previous, None)
        if isinstance(child, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            setattr(module, previous, fuse_conv_bn_eval(convolution, child))
            setattr(module, name, nn.Identity())
        _fold_batch_norms(child)
        previous = name


def native_precision(device: torch.device | str = "cpu") -> Precision:
    """The precision that is faster on a device: bfloat16 or float32."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if is_bfloat16_faster() else "float32"
