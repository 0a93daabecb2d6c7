"""The pretrained trunk: a ResNet up to its deepest used layer, and its weights."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from padim_ray import fused, resnet
from padim_ray.errors import ModelError
from padim_ray.fused import TOGETHER, select_channels
from padim_ray.resnet import BACKBONES, STRIDES
from padim_ray.storage import Location

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ALL = "all"
Precision = Literal["float32", "bfloat16"]
StateDict = Mapping[str, torch.Tensor]


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
        max_pool: fused.MaxPool | None = None,
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
        if fuse and fused.is_available(device, self.dtype):
            self.fused = fused.FusedStages(
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


def load_state_dict(stages: nn.Module, state_dict: StateDict) -> None:
    """Give the trunk its weights; other keys (a classifier, deeper layers) are ignored.

    Raises:
        ModelError: naming the first keys that are missing or have another shape.
    """
    wanted = {
        name: tensor.shape
        for name, tensor in stages.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise ModelError(
            f"The weights lack {len(missing)} of the trunk's {len(wanted)} tensors: "
            f"{_first(missing)}"
        )
    wrong = [
        f"{name} is {tuple(state_dict[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if state_dict[name].shape != shape
    ]
    if wrong:
        raise ModelError(f"The weights don't fit the backbone: {_first(wrong)}")
    stages.load_state_dict(
        {name: state_dict[name].float() for name in wanted}, strict=False, assign=True
    )


def _first(items: Sequence[str], shown: int = 4) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" * (len(items) > shown))


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


def read_weights(
    source: str, backbone: str, layers: Sequence[str], storage_options: Mapping | None = None
) -> dict[str, torch.Tensor]:
    """The trunk's tensors from a torchvision weights name, or a path or URI of a state dict.

    Args:
        source: such as "IMAGENET1K_V1", or the name of a `.pth`, `.pt` or `.safetensors` file.

    Raises:
        ModelError: if they can't be found or read, or don't fit the backbone.
    """
    if source.endswith((".pth", ".pt", ".safetensors")):
        state_dict = _read_file(Location.of(source, storage_options))
    else:
        state_dict = _read_torchvision(source, backbone)
    stages = resnet.build(backbone, layers)
    load_state_dict(stages, state_dict)
    return {
        name: tensor.contiguous()
        for name, tensor in stages.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _read_file(location: Location) -> StateDict:
    try:
        with location.as_local_file() as path:
            content = _parse(path, location.uri)
    except FileNotFoundError as error:
        raise ModelError(f"There are no weights at {location.uri}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{location.uri} holds no plain state dict (names to tensors)")
    return content


def _parse(path: Path, uri: str) -> Any:
    path.stat()  # a missing file is not a broken one
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign bytes torch's unpickler raises nearly anything
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{uri} holds no plain state dict: {reason}") from error


def _read_torchvision(name: str, backbone: str) -> StateDict:
    import torchvision  # see `resnet` for what it costs

    known = torchvision.models.get_model_weights(backbone)
    family, _, member = name.rpartition(".")
    if member not in known.__members__ or family not in ("", known.__name__):
        raise ModelError(
            f"{name!r} is neither a .pth or .safetensors file nor a torchvision weights name for "
            f"{backbone}; known are {', '.join(known.__members__)}"
        )
    try:
        return known[member].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # urllib's errors, or another file than was meant
        raise ModelError(
            f"torchvision can't download {backbone}'s weights {member} ({error}); "
            "give --weights the name of a file"
        ) from error


def weights_sha256(state_dict: StateDict) -> str:
    """SHA-256 over names, shapes and values: the same in .pth and .safetensors files."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        array = state_dict[name].float().contiguous().numpy()
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def native_precision(device: torch.device | str = "cpu") -> Precision:
    """The fastest precision that a device computes natively: bfloat16 or float32."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # torch 2.11 may not have the query: float32 is right everywhere
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"
