"""The pretrained trunk: a ResNet up to its deepest used layer, and its weights."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from padim_ray.errors import ModelError
from padim_ray.features.trunks import resnet, resnet_fused
from padim_ray.features.trunks.resnet import BACKBONES, STRIDES
from padim_ray.features.trunks.resnet_fused import TOGETHER, select_channels
from padim_ray.features.weights import StateDict, load_state_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ALL = "all"
Precision = Literal["float32", "bfloat16"]


class Trunk(nn.Module):
    """Images to the chosen channels of each used layer's feature map.

    Batch norms are folded into the convolutions, and the tensors are channels-last. On GPUs, in
    bfloat16, a level's last channel is repeated until their number is a multiple of 16: `widths`.

    Args:
        fuse: where this PyTorch can, compute the same by `fused`, not by modules.
        together: images per pass of `fused`; default: as many as suit a CPU.
        max_pool: what pools there, instead of PyTorch's operators.
    """

    def __init__(
        self,
        backbone: str,
        channels: Mapping[str, Sequence[int]],
        state_dict: StateDict,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        fuse: bool = True,
        together: int = TOGETHER,
        max_pool: resnet_fused.MaxPool | None = None,
    ) -> None:
        super().__init__()
        stages = resnet.build(backbone, tuple(channels))
        load_state_dict(stages, state_dict)
        _fold_batch_norms(stages)
        stages.requires_grad_(False).eval()
        self.dtype = getattr(torch, precision)
        self.channels = {
            layer: torch.tensor(indices, dtype=torch.int64, device=device)
            for layer, indices in channels.items()
        }
        mean, std = (
            255 * torch.tensor(v, device=device)[:, None, None]
            for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.fused = self.stages = None  # one of them
        device = torch.device(device)
        if fuse and resnet_fused.is_available(device, self.dtype):
            self.fused = resnet_fused.FusedStages(
                stages, self.channels, mean, std, self.dtype, device, together, max_pool
            )
        else:
            self.stages = stages.to(device, self.dtype, memory_format=torch.channels_last)
        given = self.fused.channels if self.fused else self.channels
        self.widths = [len(kept) for kept in given.values()]

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W), 0…255 → per level, finest first, (B, c_ℓ, H_ℓ, W_ℓ)."""
        if self.fused:
            return self.fused(images)
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


def check_layers(backbone: str, layers: Sequence[str]) -> None:
    """Raises: ModelError for an unknown backbone or layer."""
    if backbone not in BACKBONES:
        raise ModelError(f"Unknown backbone {backbone!r}; known are {', '.join(BACKBONES)}")
    if not layers or any(layer not in STRIDES for layer in layers):
        raise ModelError(f"Unknown layers {','.join(layers)!r}; choose among {', '.join(STRIDES)}")


def choose_channels(
    backbone: str, layers: Sequence[str], n_features: int | Literal["all"] | None, seed: int
) -> dict[str, list[int]]:
    """The kept channels of each layer, finest first (PaDiM's random reduction, section 3.2).

    Args:
        n_features: how many in all layers together, drawn by `seed`, or "all". None: all for
            resnet18 and resnet34, 550 for the others (the paper's choice for wide_resnet50_2).
    """
    every = BACKBONES[backbone].channels
    widths = {layer: width for layer, width in every.items() if layer in layers}
    total = sum(widths.values())
    if n_features is None:
        n_features = ALL if backbone in ("resnet18", "resnet34") else min(550, total)
    if n_features == ALL:
        n_features = total
    if not 1 <= n_features <= total:
        raise ModelError(f"n_features must be between 1 and {total}, or 'all', not {n_features}")
    kept = set(random.Random(seed).sample(range(total), n_features))
    channels, first = {}, 0
    for layer, width in widths.items():
        channels[layer] = [index for index in range(width) if first + index in kept]
        first += width
    return channels


def native_precision(device: torch.device | str = "cpu") -> Precision:
    """The fastest precision that a device computes natively: bfloat16 or float32."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # torch 2.11 may not have the query: float32 is right everywhere
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"
