"""How a job divides a cluster between actors, decoding tasks and helper tasks.

Ray's CPUs are bookkeeping: they say how many tasks may run at once. Actors never ask for more than
half of a node's, so that decoding, writing and Ray Data's own helpers can always run beside them;
a pool of actors that takes every CPU would wait for its input forever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from padim_ray.errors import PadimError

CORES_PER_CPU_ACTOR = 8  # a convolution's threads pay up to about here; further actors pay more


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of a node, as Ray counts them."""

    cpus: float
    gpus: float = 0


@dataclass(frozen=True)
class Plan:
    """What to ask Ray for.

    `threads`: compute threads of one actor. `decoders`: decoding tasks at once, in the cluster.
    `finish_cpus`: of a task that runs when the actors are gone.
    """

    actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int
    decoders: int
    decode_cpus: float
    helper_cpus: float
    finish_cpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.actor_gpus else "cpu"


def plan_resources(nodes: Sequence[Node], actors: int | None = None) -> Plan:
    """Divide the nodes' CPUs and GPUs.

    On each node half of the CPUs are for actors, a quarter for decoding and a quarter for helpers,
    asked for in fractions where a node is small. With GPUs, one actor has each, and asks for little
    CPU: nearly all CPUs decode.

    Args:
        actors: how many, instead of one per GPU or per 8 cores.

    Raises:
        PadimError: if there is nothing to run on.
    """
    nodes = [node for node in nodes if node.cpus > 0]
    if not nodes:
        raise PadimError("The Ray cluster has no CPUs; add a worker node")
    smallest = min(node.cpus for node in nodes)
    cores = sum(int(node.cpus) or 1 for node in nodes)
    gpus = int(sum(node.gpus for node in nodes))
    if gpus:
        count = actors or gpus
        share = 0.5 * min(node.cpus / node.gpus for node in nodes if node.gpus)
        return Plan(
            actors=count,
            actor_cpus=_floor(min(1.0, share * min(1, gpus / count))),
            actor_gpus=1.0 if count <= gpus else _floor(1 / -(-count // gpus)),
            threads=1,
            decoders=max(1, cores - gpus),
            decode_cpus=_floor(min(0.75, smallest / 4)),
            helper_cpus=_floor(min(0.25, smallest / 4)),
            finish_cpus=_floor(min(1.0, smallest)),
        )
    per_node = [max(1, round(node.cpus / CORES_PER_CPU_ACTOR)) for node in nodes]
    if actors:
        per_node = [-(-actors // len(nodes))] * len(nodes)
    share = min(node.cpus / number for node, number in zip(nodes, per_node, strict=True))
    return Plan(
        actors=actors or sum(per_node),
        actor_cpus=_floor(share / 2),
        actor_gpus=0,
        threads=max(1, int(share)),
        decoders=cores,
        decode_cpus=_floor(min(1.0, smallest) / 4),
        helper_cpus=_floor(min(1.0, smallest / 4)),
        finish_cpus=_floor(min(1.0, smallest)),
    )


def _floor(share: float) -> float:
    """Ray counts resources in ten-thousandths; never round up to more than there is."""
    return max(int(share * 10_000), 1) / 10_000
