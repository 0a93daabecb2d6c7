import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.densities.gaussian import GaussianDensity
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.errors import ModelError
from tests.densities.test_moments import moments_of

regularizations = st.builds(
    Regularization,
    st.sampled_from(["shrink", "paper"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 9),
    st.floats(0, 9),
)


@given(regularizations)
def test_settings_are_the_same_after_json(regularization):
    density = GaussianDensity(regularization)
    settings = density.to_json()
    assert settings.pop("kind") == "gaussian"
    assert GaussianDensity.of_json(settings, "spec.density") == density


@pytest.mark.parametrize(
    "settings", [{"kind": "ledoit"}, {"shrinkage": 1}, {"ridge": -1}, {"epsilon": -0.1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ModelError, match="must"):
        Regularization(**settings)


def test_other_settings_in_json_are_refused():
    for value in ({}, {"regularization": {}, "x": 1}):
        with pytest.raises(ModelError, match="a must have a regularization and nothing else"):
            Regularization.only_field(value, "a")


def test_scatters_of_different_images_are_not_pooled():
    three, four = (pool(moments_of([torch.rand(4, 2, count)])) for count in (3, 4))
    with pytest.raises(ValueError, match="3 and of 4 images"):
        three + four


def test_pooling_runs_of_cells_pools_all_cells():
    moments = moments_of([torch.rand(6, 2, 5), torch.rand(3, 4, 5)])
    whole, parts = pool(moments), pool(moments.cells(0, 2)) + pool(moments.cells(2, 3))
    assert parts.cells == whole.cells == (6, 3)
    for row, other in zip(parts.sums, whole.sums, strict=True):
        torch.testing.assert_close(row, other)
