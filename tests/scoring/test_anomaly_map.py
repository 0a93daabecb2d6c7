import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from padim_ray.scoring.anomaly_map import AnomalyMapper, image_scores


@given(
    st.sampled_from([((64, 64), (256, 256)), ((16, 24), (64, 96)), ((4, 4), (64, 64))]),
    st.sampled_from([4.0, 2.0, 1.5, 0.0]),
    st.integers(0, 2**32 - 1),
)
def test_a_map_is_upsampled_and_then_smoothed(shapes, sigma, seed):
    patches, size = shapes
    distances = torch.from_numpy(np.random.default_rng(seed).exponential(10, (2, *patches)))
    upsampled = interpolate(distances[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    expected = upsampled.numpy()
    if sigma:
        expected = gaussian_filter(
            expected, sigma, mode="mirror", radius=int(4 * sigma + 0.5), axes=(1, 2)
        )
    maps = AnomalyMapper(patches, size, sigma).maps(distances)
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9)


def test_numpy_and_torch_give_the_same_map():
    distances = np.random.default_rng(0).random((3, 16, 16), np.float32)
    mapper = AnomalyMapper((16, 16), (64, 64))
    maps = mapper.maps(distances)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, mapper.maps(torch.from_numpy(distances)).numpy(), rtol=1e-5)


def test_without_a_share_the_score_is_the_maps_maximum():
    maps = torch.arange(24.0).reshape(2, 3, 4)
    assert image_scores(torch.zeros(2, 1, 1), maps, 0).tolist() == [11.0, 23.0]


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0.001, 1),
    st.integers(0, 2**32 - 1),
)
def test_the_score_is_the_mean_of_the_highest_share_of_cells(cells, share, seed):
    distances = np.random.default_rng(seed).exponential(10, (3, *cells))
    count = max(1, round(share * cells[0] * cells[1]))
    expected = np.sort(distances.reshape(3, -1))[:, -count:].mean(1)
    found = image_scores(torch.from_numpy(distances), torch.zeros(3, 1, 1), share)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_an_image_smaller_than_the_kernel_still_has_a_map():
    maps = AnomalyMapper((4, 4), (16, 16)).maps(np.ones((1, 4, 4)))
    np.testing.assert_allclose(maps, 1)
