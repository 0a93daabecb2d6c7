import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.pipeline.resources import Node, plan_resources

CPUS = st.one_of(st.integers(1, 128), st.floats(0.5, 8))
NODES = st.lists(st.builds(Node, CPUS, st.integers(0, 8)), min_size=1, max_size=12)


@given(NODES, st.one_of(st.none(), st.integers(1, 64)))
def test_a_decoder_and_a_helper_always_fit_beside_the_actors(nodes, actors):
    """Actors take at most half of all CPUs, so however Ray packs them some node has half free."""
    plan = plan_resources(nodes, actors)
    assert plan.actors * plan.actor_cpus <= sum(node.cpus for node in nodes) / 2 + 1e-9
    assert plan.decode_cpus + plan.helper_cpus <= min(node.cpus for node in nodes) / 2 + 1e-9


def test_every_gpu_has_one_actor():
    plan = plan_resources([Node(2), Node(16, 4), Node(16, 4), Node(32)])
    assert (plan.actors, plan.actor_gpus, plan.device) == (8, 1, "cuda")


def test_more_actors_than_gpus_share_them():
    plan = plan_resources([Node(16, 2)], actors=4)
    assert plan.actors * plan.actor_gpus <= 2


@pytest.mark.parametrize(
    ("cpus", "actors", "threads"), [(1, 1, 1), (2, 1, 2), (8, 1, 8), (16, 2, 8), (64, 8, 8)]
)
def test_processors_are_shared_among_actors_of_eight_threads(cpus, actors, threads):
    plan = plan_resources([Node(cpus)])
    assert (plan.actors, plan.threads, plan.device) == (actors, threads, "cpu")


def test_a_head_without_work_is_left_alone():
    assert plan_resources([Node(0), Node(8)]) == plan_resources([Node(8)])


def test_a_cluster_without_processors_is_refused():
    with pytest.raises(PadimError, match="no CPUs"):
        plan_resources([Node(0)])
