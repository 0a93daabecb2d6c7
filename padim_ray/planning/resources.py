"""Divide a cluster between actors, decoding tasks and helper tasks.

Ray's CPUs are bookkeeping: they say how many tasks may run at once. Actors never ask for much more
than half of a node's CPUs, so that decoding, writing and Ray Data's own helpers can always run
beside them. A pool of actors that takes every CPU would wait for its input forever.

With a decode resource, everything but the actors runs on the nodes that have it: decoding, merging,
factorising, counting, drawing and writing. GPU nodes then hold actors only, so an autoscaler can
remove them as soon as the actors end, and the loss of one loses no results. It is a custom resource
and not a label of the nodes, because every autoscaler of Ray supports resources, but only the
second version supports labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from padim_ray.errors import PadimError

CORES_PER_CPU_ACTOR = 8  # beyond that, another actor gains more than threads in a convolution
TASKS_PER_CORE = 4 / 3  # Ray Data takes up to 0.2 s to start the next task after one ends
DECODE_UNIT = 0.001  # a task's amount of the decode resource
MORE_THAN_HALF = 0.0001  # Ray's smallest unit, added to half of a node


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of a node, as Ray counts them, and whether it may decode."""

    cpus: float
    gpus: float = 0
    decodes: bool = True


@dataclass(frozen=True)
class Share:
    """The resources that a task or an actor asks Ray for.

    Attributes:
        cpus: logical CPUs.
        gpus: logical GPUs.
        resource: name of the decode resource, if it needs it.
    """

    cpus: float
    gpus: float = 0
    resource: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for Ray's `options` and Ray Data's `map_batches`."""
        resources = {self.resource: DECODE_UNIT} if self.resource else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": resources}


@dataclass(frozen=True)
class Plan:
    """How a cluster is divided.

    Attributes:
        actors: actors that there is room for now.
        most_actors: maximum number of actors when nodes join; None: as many as the work is worth.
        asked_actors: actors to ask for at once, so that an autoscaler adds nodes for them.
        actor: resources of an actor.
        threads: compute threads of an actor.
        decoders: the cluster's cores that decode; None on a cluster that grows: all that fit.
        decode: resources of a decoding task.
        helper: resources of a task that merges, counts, draws or writes beside the actors.
        finish: resources of such a task when the actors have ended.
    """

    actors: int
    most_actors: int | None
    asked_actors: int
    actor: Share
    threads: int
    decoders: int | None
    decode: Share
    helper: Share
    finish: Share

    @property
    def device(self) -> str:
        return "cuda" if self.actor.gpus else "cpu"

    @property
    def decode_tasks(self) -> int | None:
        """Decoding tasks at a time, at most; None on a cluster that grows: all that fit."""
        return None if self.decoders is None else decoding_tasks(self.decoders)

    @property
    def fixed_decoders(self) -> int:
        """`decoders` of a cluster that doesn't grow."""
        assert self.decoders is not None, "the cluster may grow"
        return self.decoders


def plan_resources(
    nodes: Sequence[Node],
    actors: int | None = None,
    *,
    gpus: int | None = None,
    decode_resource: str | None = None,
    grows: bool = False,
) -> Plan:
    """Divide the nodes' CPUs and GPUs.

    On each node half of the CPUs are for actors, a quarter for decoding and a quarter for helpers;
    on small nodes these are fractions of a CPU. With GPUs, each has one actor, which asks for
    little CPU, so nearly all CPUs decode.

    Args:
        nodes: the nodes that are alive.
        actors: number of actors, instead of one per GPU or per 8 cores.
        gpus: maximum number of GPUs, including those that join later; 0: compute on CPUs; None: all
            that there are, and all that join.
        decode_resource: name of the resource of the nodes that decode; None: all nodes decode.
        grows: whether nodes may join.

    Raises:
        PadimError: if no node has CPUs and the decode resource, or GPUs are asked for where there
            are none and no node joins.
    """
    there = int(sum(node.gpus for node in nodes))
    cpus_per_gpu = [node.cpus / node.gpus for node in nodes if node.gpus]
    nodes = [node for node in nodes if node.cpus > 0]
    decoding = [node for node in nodes if node.decodes]
    if not decoding:
        raise PadimError(
            f"No node of the Ray cluster has CPUs and the resource {decode_resource!r} that "
            "--decode-resource names"
            if decode_resource
            else "The Ray cluster has no CPUs; add a worker node"
        )
    smallest = min(node.cpus for node in decoding)
    cores = sum(int(node.cpus) or 1 for node in decoding)

    def share(cpus: float) -> Share:
        return Share(_floor(cpus), resource=decode_resource)

    if gpus and not (there or grows):
        raise PadimError(f"--gpus is {gpus}, but this machine has no GPU, and no node joins")
    usable = there if gpus is None else gpus if grows else min(gpus, there)
    if usable:
        count = actors or min(usable, there)
        asked = actors or usable
        # with a decode resource actors ask for no CPU: GPU nodes may be started without any
        cpus = 0 if decode_resource else min(1, min(cpus_per_gpu, default=1) / 2)
        decoders = max(1, cores - (0 if decode_resource else usable))
        return Plan(
            actors=count,
            most_actors=actors or (usable if gpus or not grows else None),
            asked_actors=asked,
            actor=Share(
                _floor(cpus * min(1, usable / asked)) if cpus else 0,
                1.0 if asked <= usable else _floor(1 / -(-asked // usable)),
            ),
            threads=1,
            decoders=None if grows else decoders,
            decode=share(
                min(0.75, smallest / 4) * (1 if grows else decoders / decoding_tasks(decoders))
            ),
            helper=share(min(0.25, smallest / 4)),
            finish=share(min(1.0, smallest)),
        )
    per_node = [max(1, round(node.cpus / CORES_PER_CPU_ACTOR)) for node in nodes]
    if actors:
        per_node = [-(-actors // len(nodes))] * len(nodes)
    part = min(node.cpus / number for node, number in zip(nodes, per_node, strict=True))
    count = actors or sum(per_node)
    can_grow = grows and not actors
    return Plan(
        actors=count,
        most_actors=None if can_grow else count,
        asked_actors=count,
        # on a growing cluster more than half: no second actor must fit on the same node
        actor=Share(_floor(part / 2) + (MORE_THAN_HALF if can_grow else 0)),
        threads=max(1, int(part)),
        decoders=None if can_grow else cores,
        # without a limit to their number, one task per core fits beside actors and helpers
        decode=share(
            min(3 / 8, smallest / 4)
            if can_grow
            else min(1.0, smallest) / 4 * cores / decoding_tasks(cores)
        ),
        helper=share(min(1.0, smallest / 4)),
        finish=share(min(1.0, smallest)),
    )


def decoding_tasks(cores: int) -> int:
    """The number of tasks that keeps this many cores busy with decoding."""
    return math.ceil(cores * TASKS_PER_CORE)


def _floor(share: float) -> float:
    """Round down to Ray's unit of 0.0001, but not to 0. Rounded up, the shares wouldn't fit."""
    return max(math.floor(share * 10_000 + 1e-6), 1) / 10_000  # 0.5005 * 10_000 < 5005
