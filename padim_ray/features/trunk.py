"""The pretrained trunk: a CNN up to its deepest used level."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from padim_ray.features.channels import select_channels
from padim_ray.features.trunks import find_trunk
from padim_ray.features.weights import StateDict, load_state_dict

CPU_PASS = 4  # images: few enough that an activation is still in the cache when it is read
GPU_PASS = 256  # images: with fewer, launching kernels takes longer than computing

Precision = Literal["float32", "bfloat16"]


class Trunk(nn.Module):
    """Images to the chosen channels of each used level's feature map.

    Batch norms are folded into the convolutions, and the tensors are channels-last.

    Args:
        name: of the trunk.
        channels: the kept channels of each used level, finest first.
        state_dict: weights.
        precision: to compute in.
        device: where to compute.
        fuse: use the trunk's fused form, where it has one that works here.
        pass_size: images per pass of the fused form. Default: as many as suit the device.

    Attributes:
        widths: channels that come out per level. In bfloat16 on GPUs the last one is repeated until
            their number is a multiple of 16.
    """

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
        self.dtype = getattr(torch, precision)
        self.channels = {
            level: torch.tensor(indices, dtype=torch.int64, device=device)
            for level, indices in channels.items()
        }
        for part in ("mean", "std"):
            pixels = 255 * torch.tensor(getattr(architecture, part), device=device)
            self.register_buffer(part, pixels[:, None, None], persistent=False)
        self.fused = self.stages = None  # one of them
        if fuse:
            size = pass_size or (GPU_PASS if device.type == "cuda" else CPU_PASS)
            self.fused = architecture.fuse(stages, self.channels, self.dtype, device, size)
        if self.fused:
            self.widths = list(self.fused.widths)
        else:
            self.stages = stages.to(device, self.dtype, memory_format=torch.channels_last)
            self.widths = [len(kept) for kept in self.channels.values()]

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W), 0…255 → per level, finest first, (B, c_ℓ, H_ℓ, W_ℓ)."""
        if self.fused:
            return self.fused.forward(images)
        if len(images) == 1:
            # one image alone takes other kernels, which round differently than a batch's do
            return [level[:1] for level in self(images.expand(2, -1, -1, -1))]
        # float32 means float32: by default GPUs round a convolution's inputs to TF32. What isn't
        # named here is switched off meanwhile, cuDNN itself included
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.compute(images)

    def compute(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The same by PyTorch's modules."""
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
    """Replace each convolution and the batch norm after it by one convolution."""
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
    """The fastest precision that a device computes natively: bfloat16 or float32."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # torch 2.11 may not have the query: float32 is right everywhere
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"
