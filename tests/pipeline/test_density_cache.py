"""The cache of densities: hits, bounds and loading ahead."""

import threading
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.errors import ModelError
from padim_ray.pipeline.graphs import find_next_groups
from padim_ray.pipeline.stages.density_cache import DensityCache

GROUPS = ["a", "b", "c", "d"]
FOLLOWING = dict(pairwise(GROUPS))
SIZE = 4 * (3 + 9)


def gaussian(group):
    return Gaussian((torch.full((1, 3), float(ord(group))),), ((torch.ones(1, 3, 3),),))


class Storage:
    """Loads densities, and counts the loads."""

    def __init__(self):
        self.loaded = []

    def __call__(self, group):
        self.loaded.append(group)
        return gaussian(group)


@given(st.lists(st.sampled_from(GROUPS), max_size=30), st.integers(0, 5 * SIZE))
def test_every_group_is_returned_and_memory_is_bounded(asked, most_bytes):
    storage = Storage()
    cache = DensityCache(storage, FOLLOWING, most_bytes)
    for group in asked:
        assert float(cache[group].means[0][0, 0]) == ord(group)
        held = len(cache._loaded) + (cache._ahead is not None)
        assert held <= max(1, most_bytes // SIZE)


def hits_of_a_plain_cache(asked, room):
    """The requests that hit a cache of the `room` groups used last."""
    kept, hits = OrderedDict(), []
    for group in asked:
        hits.append(group in kept)
        kept[group] = True
        kept.move_to_end(group)
        while len(kept) > room:
            kept.popitem(last=False)
    return hits


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(0, 6 * SIZE))
def test_the_least_recently_used_group_is_dropped(asked, most_bytes):
    storage = Storage()
    cache = DensityCache(storage, {}, most_bytes)
    hits = []
    for group in asked:
        before = len(storage.loaded)
        assert float(cache[group].means[0][0, 0]) == ord(group)
        hits.append(len(storage.loaded) == before)
    assert hits == hits_of_a_plain_cache(asked, max(1, most_bytes // SIZE))
    assert cache.started == storage.loaded


@given(st.lists(st.sampled_from(GROUPS), max_size=60), st.integers(2, 5))
def test_a_group_in_the_cache_is_not_loaded_again(asked, room):
    loads = []

    def load(group):
        assert group not in cache._loaded
        loads.append(group)
        return gaussian(group)

    cache = DensityCache(load, FOLLOWING, room * SIZE)
    for group in asked:
        cache[group]
        if cache._ahead:
            cache._ahead[1].result()
        assert len(cache._loaded) + (cache._ahead is not None) <= room
    assert loads == cache.started


def test_a_group_loaded_ahead_is_kept_while_another_one_is_used():
    storage = Storage()
    cache = DensityCache(storage, {"a": "b"}, 2 * SIZE)
    cache["a"]
    cache["c"]  # blocks may arrive out of order
    cache["b"]
    assert storage.loaded == ["a", "b", "c"]


def test_only_groups_that_every_actor_needs_are_loaded_ahead():
    shards = ["a", "b", "b", "c", "d", "d", "d"]
    assert find_next_groups(shards, 1) == {"a": "b", "b": "c", "c": "d"}
    assert find_next_groups(shards, 2) == {"a": "b", "c": "d"}
    assert find_next_groups(shards, 4) == {}


def test_groups_in_order_are_loaded_once_each():
    storage = Storage()
    cache = DensityCache(storage, FOLLOWING, 2 * SIZE)
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

    cache = DensityCache(load, FOLLOWING, 2 * SIZE)
    cache["a"]
    assert begun.wait(10)


def test_without_room_nothing_is_loaded_ahead():
    storage = Storage()
    cache = DensityCache(storage, FOLLOWING, 2 * SIZE - 1)
    cache["a"]
    assert cache._ahead is None
    cache["b"]
    assert storage.loaded == ["a", "b"]


def test_an_error_while_loading_ahead_is_raised_when_the_group_is_asked_for():
    def load(group):
        if group == "b":
            raise ModelError("b is damaged")
        return gaussian(group)

    cache = DensityCache(load, FOLLOWING, 4 * SIZE)
    cache["a"]
    with pytest.raises(ModelError, match="b is damaged"):
        cache["b"]
    assert float(cache["c"].means[0][0, 0]) == ord("c")
