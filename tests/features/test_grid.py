import numpy as np
import pytest
import torch
from hypothesis import given

from padim_ray.features.grid import PatchGrid, split_cells
from tests.helpers.features import grids, nest, random_features


@given(grids())
def test_every_cell_lies_among_its_ancestors_descendants(grid):
    fine, coarse = grid.grids[0], grid.grids[-1]
    y, x = np.divmod(grid.orders[0].numpy(), fine[1])
    ancestor = (y * coarse[0] // fine[0]) * coarse[1] + x * coarse[1] // fine[1]
    descendants = grid.cells[0] // grid.cells[-1]
    assert (ancestor.reshape(-1, descendants) == grid.orders[-1].numpy()[:, None]).all()


@given(grids())
def test_unnesting_gives_back_the_image(grid):
    features = random_features(grid, 3, np.random.default_rng(0))
    nested = nest(grid, features)
    first_channel = grid.unnest(nested[0][:, 0])
    np.testing.assert_array_equal(first_channel.numpy(), features[0][:, 0])


def test_channels_last_maps_nest_like_contiguous_ones():
    grid = PatchGrid(((4, 4), (2, 2)), (3, 2))
    maps = [torch.rand(5, 3, 4, 4), torch.rand(5, 2, 2, 2)]
    channels_last = [m.to(memory_format=torch.channels_last) for m in maps]
    for a, b in zip(grid.nest(maps).levels, grid.nest(channels_last).levels, strict=True):
        assert torch.equal(a, b)


def test_a_grid_that_is_no_multiple_of_the_next_is_refused():
    with pytest.raises(ValueError, match="not an integer multiple"):
        PatchGrid(((6, 6), (4, 4)), (1, 1))


def test_runs_of_cells_cover_all_cells_once():
    assert split_cells(10, 3) == [(0, 3), (3, 7), (7, 10)]
    assert split_cells(2, 5) == [(0, 1), (1, 2)]
