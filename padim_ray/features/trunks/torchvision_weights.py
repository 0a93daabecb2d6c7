"""Weights that torchvision knows by name."""

from collections.abc import Mapping

import torch

from padim_ray.errors import ModelError


def read_torchvision(name: str, backbone: str) -> Mapping[str, torch.Tensor]:
    """Read torchvision's weights by name, downloading them unless they are cached.

    Args:
        name: such as "IMAGENET1K_V1", or "ResNet18_Weights.IMAGENET1K_V1".
        backbone: torchvision's name of the network.

    Raises:
        ModelError: if torchvision has no such weights, or they can't be downloaded.
    """
    import torchvision  # takes 2 seconds and 170 MB: only for those who need its weights

    known = torchvision.models.get_model_weights(backbone)
    family, _, member = name.rpartition(".")
    if member not in known.__members__ or family not in ("", known.__name__):
        raise ModelError(
            f"{name!r} is neither a .pth or .safetensors file nor a torchvision weights name for "
            f"{backbone}; known are {', '.join(known.__members__)}"
        )
    try:
        return known[member].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file's hash is wrong
        raise ModelError(
            f"torchvision can't download {backbone}'s weights {member} ({error}); "
            "give --weights the name of a file"
        ) from error
