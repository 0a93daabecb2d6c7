import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.features.channels import select_channels


@st.composite
def kept_channels(draw):
    """A number of channels, and ascending indices of some of them."""
    channels = draw(st.integers(1, 9))
    kept = draw(st.sets(st.integers(0, channels - 1)).map(sorted))
    return channels, torch.tensor(kept, dtype=torch.int64)


@given(kept_channels(), st.booleans())
def test_selected_channels_are_those_of_indexing(channels_and_kept, channels_last):
    channels, kept = channels_and_kept
    features = torch.rand(2, channels, 3, 4)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    assert torch.equal(select_channels(features, kept), features[:, kept])


def test_all_channels_are_not_copied():
    features = torch.rand(2, 3, 4, 4)
    assert select_channels(features, torch.arange(3)) is features
