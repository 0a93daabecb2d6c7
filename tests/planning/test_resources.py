import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.pipeline.cluster.pools import actor_pool
from padim_ray.planning.resources import MORE_THAN_HALF, Node, plan_resources

CPUS = st.one_of(st.integers(1, 128), st.floats(0.5, 8))
NODES = st.lists(st.builds(Node, CPUS, st.integers(0, 8)), min_size=1, max_size=12)
ACTORS = st.one_of(st.none(), st.integers(1, 64))


@given(NODES, ACTORS)
def test_a_decoder_and_a_helper_always_fit_beside_the_actors(nodes, actors):
    """Actors take at most half of all CPUs, so however Ray packs them, some node is half free."""
    plan = plan_resources(nodes, actors)
    assert plan.actors * plan.actor.cpus <= sum(node.cpus for node in nodes) / 2 + 1e-9
    assert plan.decode.cpus + plan.helper.cpus <= min(node.cpus for node in nodes) / 2 + 1e-9


@given(NODES)
def test_helpers_fit_beside_the_maximum_of_decoding_tasks(nodes):
    plan = plan_resources(nodes)
    cpus = sum(node.cpus for node in nodes)
    taken = plan.actors * plan.actor.cpus + plan.decode_tasks * plan.decode.cpus
    assert taken + plan.helper.cpus <= cpus + 1e-9


@example([Node(1.001)])
@given(st.lists(st.builds(Node, CPUS), min_size=1, max_size=12))
def test_no_second_actor_fits_on_a_node_for_one_even_if_nodes_may_join(nodes):
    assume(max(node.cpus for node in nodes) < 12)
    plan = plan_resources([max(nodes, key=lambda node: node.cpus)], grows=True)
    assert 2 * plan.actor.cpus > max(node.cpus for node in nodes) >= plan.actor.cpus
    plan = plan_resources(nodes, grows=True)
    smallest = min(node.cpus for node in nodes)
    assert plan.actor.cpus + max(plan.decode.cpus, plan.helper.cpus) <= smallest
    assert plan.actor.cpus <= smallest / 2 + MORE_THAN_HALF


def test_every_gpu_has_one_actor():
    plan = plan_resources([Node(2), Node(16, 4), Node(16, 4), Node(32)])
    assert (plan.actors, plan.actor.gpus, plan.device) == (8, 1, "cuda")


def test_more_actors_than_gpus_share_them():
    plan = plan_resources([Node(16, 2)], actors=4)
    assert plan.actors * plan.actor.gpus <= 2


@given(NODES, ACTORS, st.one_of(st.none(), st.integers(0, 64)))
def test_each_actor_gets_a_gpu_and_never_more_are_used_than_asked_for(nodes, actors, gpus):
    plan = plan_resources(nodes, actors, gpus=gpus, grows=True)
    usable = sum(node.gpus for node in nodes) if gpus is None else gpus
    assert (plan.device == "cuda") == (usable > 0)
    assert plan.asked_actors * plan.actor.gpus <= usable
    if actors is None and usable:
        assert plan.actor.gpus == 1


@pytest.mark.parametrize(
    ("cpus", "actors", "threads"), [(1, 1, 1), (2, 1, 2), (8, 1, 8), (16, 2, 8), (64, 8, 8)]
)
def test_processors_are_shared_among_actors_of_eight_threads(cpus, actors, threads):
    plan = plan_resources([Node(cpus)])
    assert (plan.actors, plan.threads, plan.device) == (actors, threads, "cpu")


def test_a_head_without_cpus_is_not_used():
    assert plan_resources([Node(0), Node(8)]) == plan_resources([Node(8)])


def test_everything_but_actors_asks_for_the_decode_resource():
    nodes = [Node(4, decodes=True), Node(64, 8, decodes=False)]
    plan = plan_resources(nodes, decode_resource="padim_decode")
    for share in (plan.decode, plan.helper, plan.finish):
        assert share.options["resources"] == {"padim_decode": 0.001}
        assert share.cpus <= 4
    assert (plan.actor.cpus, plan.actor.options["resources"]) == (0, {})
    assert (plan.decoders, plan.decode_tasks) == (4, 6)


@pytest.mark.parametrize(("decode_resource", "decode"), [(None, 0.375), ("padim_decode", 0.5)])
def test_gpu_nodes_may_be_without_cpus(decode_resource, decode):
    nodes = [Node(4), Node(0, 8, decodes=False)]
    plan = plan_resources(nodes, decode_resource=decode_resource)
    assert (plan.actors, plan.actor.gpus, plan.actor.cpus) == (8, 1, 0)
    assert plan.decode.cpus == decode


@pytest.mark.parametrize(
    ("shards", "initial", "most"), [(1, 1, 1), (2, 2, 2), (20, 2, 2), (48, 6, 6), (1000, 8, 8)]
)
def test_actors_are_asked_for_on_future_gpus_as_far_as_the_work_is_worth_them(
    shards, initial, most
):
    pool = actor_pool(plan_resources([Node(8, 2)], gpus=8, grows=True), shards)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (min(2, shards), initial, most)


def test_a_job_waits_for_the_first_gpu():
    pool = actor_pool(plan_resources([Node(8)], gpus=3, grows=True), 1000)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 3, 3)


@pytest.mark.parametrize("node", [Node(8), Node(8, 1)])
def test_a_pool_may_grow_if_nodes_may_join(node):
    def sizes(**how):
        pool = actor_pool(plan_resources([node], **how), 80)
        return pool.min_size, pool.initial_size, pool.max_size

    assert sizes(grows=True) == (1, 1, 10)
    assert sizes() == sizes(actors=1, grows=True) == sizes(gpus=int(node.gpus)) == (1, 1, 1)


def test_no_gpus_at_all_means_cpus():
    assert plan_resources([Node(16, 2)], gpus=0) == plan_resources([Node(16)])


def test_gpus_of_a_machine_that_has_none_are_refused():
    with pytest.raises(PadimError, match="--gpus is 2"):
        plan_resources([Node(8)], gpus=2)


def test_a_cluster_without_processors_is_refused():
    with pytest.raises(PadimError, match="no CPUs"):
        plan_resources([Node(0)])


def test_a_cluster_without_the_decode_resource_is_refused():
    with pytest.raises(PadimError, match="the resource 'padim_decode'"):
        plan_resources([Node(8, decodes=False)], decode_resource="padim_decode")
