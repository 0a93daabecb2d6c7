"""Select channels of feature maps."""

import torch


def select_channels(features: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keep some channels of feature maps (B, C, H, W).

    Args:
        features: feature maps.
        kept: indices of the kept channels, int64 on the same device. If there are C of them, they
            must be all channels in order: the maps are returned as they are.

    Returns:
        (B, len(kept), H, W), channels-last.
    """
    if len(kept) == features.shape[1]:
        return features
    return features.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)
