"""The cluster's nodes, and the plan that follows from them."""

import logging

import ray

from padim_ray.errors import PadimError
from padim_ray.pipeline.cluster.session import is_own_ray
from padim_ray.planning.resources import Node, Plan, Share, plan_resources
from padim_ray.runs.options.common import RunOptions

log = logging.getLogger("padim_ray")
NODE_TIMEOUT = 15 * 60  # seconds for an autoscaler to add the first node


def plan_for(options: RunOptions) -> Plan:
    """Make the plan for the nodes that are alive and those that may join.

    Raises:
        PadimError: if there is no node to run on, and none joins in time.
    """
    resource, grows = options.decode_resource, not is_own_ray()
    if grows and not any(node.cpus and node.decodes for node in cluster_nodes(resource)):
        _await_node(resource)
    nodes = cluster_nodes(resource)
    there = int(sum(node.gpus for node in nodes))
    if grows and options.gpus and there < options.gpus:
        waits = "" if there else "; waiting for the first"
        log.info(
            "%d of %d GPUs are available; an autoscaler may add more%s", there, options.gpus, waits
        )
    return plan_resources(
        nodes, options.actors, gpus=options.gpus, decode_resource=resource, grows=grows
    )


def cluster_nodes(decode_resource: str | None = None) -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
            decode_resource is None or decode_resource in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def is_only_node() -> bool:
    """Whether this process's machine is the cluster's only node."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return alive == [ray.get_runtime_context().get_node_id()]


def _await_node(decode_resource: str | None) -> None:
    """Wait for a node; the pending task makes an autoscaler add one."""
    what = f" with the resource {decode_resource!r}" if decode_resource else ""
    log.info("The Ray cluster has no CPUs%s yet; waiting for a node", what)
    share = Share(1, resource=decode_resource)
    arrival = _arrive.options(**share.options).remote()
    if not ray.wait([arrival], timeout=NODE_TIMEOUT)[0]:
        ray.cancel(arrival)
        raise PadimError(
            f"No node{what} joined the Ray cluster within {NODE_TIMEOUT // 60} minutes; add one"
        )


@ray.remote(max_retries=-1)
def _arrive() -> None:
    """Do nothing; that it runs shows that there is a node."""
