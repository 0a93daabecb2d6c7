import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import ModelError
from padim_ray.gaussian import Gaussian
from padim_ray.pipeline.gaussians import GaussianCache

GROUPS = ["a", "b", "c", "d"]
SIZE = 4 * (3 + 9)


def gaussian(group):
    return Gaussian((torch.full((1, 3), float(ord(group))),), ((torch.ones(1, 3, 3),),))


class Storage:
    """Loads groups, and counts how often."""

    def __init__(self):
        self.loaded = []

    def __call__(self, group):
        self.loaded.append(group)
        return gaussian(group)


@given(st.lists(st.sampled_from(GROUPS), max_size=30), st.integers(0, 5 * SIZE))
def test_whatever_is_asked_for_comes_and_memory_is_bounded(asked, most_bytes):
    storage = Storage()
    cache = GaussianCache(storage, GROUPS, most_bytes)
    for group in asked:
        assert float(cache[group].means[0][0, 0]) == ord(group)
        held = len(cache._loaded) + (cache._ahead is not None)
        assert held <= max(1, most_bytes // SIZE)


def test_in_order_each_group_is_loaded_once():
    storage = Storage()
    cache = GaussianCache(storage, GROUPS, 2 * SIZE)
    for group in GROUPS:
        for _ in range(3):
            assert cache[group].nbytes == SIZE
    assert storage.loaded == GROUPS


def test_the_next_group_is_loaded_while_this_one_is_used():
    begun = threading.Event()

    def load(group):
        if group == "b":
            begun.set()
        return gaussian(group)

    cache = GaussianCache(load, GROUPS, 2 * SIZE)
    cache["a"]
    assert begun.wait(10)


def test_without_room_nothing_is_loaded_ahead():
    storage = Storage()
    cache = GaussianCache(storage, GROUPS, 2 * SIZE - 1)
    cache["a"]
    assert cache._ahead is None
    cache["b"]
    assert storage.loaded == ["a", "b"]


def test_what_could_not_be_loaded_ahead_fails_when_it_is_asked_for():
    def load(group):
        if group == "b":
            raise ModelError("b is damaged")
        return gaussian(group)

    cache = GaussianCache(load, GROUPS, 4 * SIZE)
    cache["a"]
    with pytest.raises(ModelError, match="b is damaged"):
        cache["b"]
    assert float(cache["c"].means[0][0, 0]) == ord("c")
