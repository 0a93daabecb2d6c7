"""The channels of a feature map that are kept."""

import torch


def select_channels(features: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, len(kept), H, W), channels-last; as they are, if all are kept."""
    if len(kept) == features.shape[1]:
        return features
    return features.permute(0, 2, 3, 1).index_select(3, kept).permute(0, 3, 1, 2)
