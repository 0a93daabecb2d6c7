"""How a job divides a cluster between actors, decoding tasks and helper tasks.

Ray's CPUs are bookkeeping: they say how many tasks may run at once. Actors never ask for much more
than half of a node's, so that decoding, writing and Ray Data's own helpers can always run beside
them; a pool of actors that takes every CPU would wait for its input forever.

With a decode resource, everything but the actors runs on the nodes that have it: decoding, and also
merging, factorising, counting, drawing and writing. GPU nodes then hold nothing but actors, so an
autoscaler can take them away as soon as these are gone, and the loss of one loses no results. It is
a custom resource, and not a label of the nodes, since every autoscaler of Ray knows resources, but
only its second version labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from padim_ray.errors import PadimError

CORES_PER_CPU_ACTOR = 8  # a convolution's threads pay up to about here; further actors pay more
TASKS_PER_CORE = 4 / 3  # Ray Data takes up to 0.2 s to follow a task with the next one
DECODE_UNIT = 0.001  # of the decode resource, for each task
MORE_THAN_HALF = 0.0001


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of a node, as Ray counts them, and whether it may decode."""

    cpus: float
    gpus: float = 0
    decodes: bool = True


@dataclass(frozen=True)
class Share:
    """What a task or an actor asks Ray for; `resource` is the decode resource's name."""

    cpus: float
    gpus: float = 0
    resource: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Named as by Ray's `options` and Ray Data's `map_batches`."""
        resources = {self.resource: DECODE_UNIT} if self.resource else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": resources}


@dataclass(frozen=True)
class Plan:
    """What to ask Ray for.

    `actors`: those there is room for. `most_actors`: as many as there may be when nodes join; None:
    as many as the work is worth. `asked_actors`: to be asked for before there is room, so that an
    autoscaler adds nodes. `threads`: compute threads of one actor. `decoders`: cores that
    decode, in the cluster; None: as many as fit. `finish`: of a task that runs when the actors are
    gone.
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
        """Decoding tasks at once, in the cluster; None: as many as fit."""
        return self.decoders and _tasks(self.decoders)


def plan_resources(
    nodes: Sequence[Node],
    actors: int | None = None,
    *,
    gpus: int | None = None,
    decode_resource: str | None = None,
    grows: bool = False,
) -> Plan:
    """Divide the nodes' CPUs and GPUs.

    On each node half of the CPUs are for actors, a quarter for decoding and a quarter for helpers,
    asked for in fractions where a node is small. With GPUs, one actor has each, and asks for little
    CPU: nearly all CPUs decode.

    Args:
        actors: exactly so many, instead of one per GPU or per 8 cores.
        gpus: how many to use at the most, whether they are there yet or not; 0: compute on CPUs.
            None: those that are there, and those that join.
        decode_resource: what nodes that decode have, if not all do.
        grows: whether nodes may join.

    Raises:
        PadimError: if there is nothing to run on.
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
        # none where nothing else runs: nodes may then be started without CPUs
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
            decode=share(min(0.75, smallest / 4) * (1 if grows else decoders / _tasks(decoders))),
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
        # where they may become more, no second one fits beside the first
        actor=Share(_floor(part / 2) + (MORE_THAN_HALF if can_grow else 0)),
        threads=max(1, int(part)),
        decoders=None if can_grow else cores,
        # without a limit to their number, as many as there are cores fit beside actors and helpers
        decode=share(
            min(3 / 8, smallest / 4) if can_grow else min(1.0, smallest) / 4 * cores / _tasks(cores)
        ),
        helper=share(min(1.0, smallest / 4)),
        finish=share(min(1.0, smallest)),
    )


def _tasks(cores: int) -> int:
    """How many tasks keep so many cores decoding."""
    return math.ceil(cores * TASKS_PER_CORE)


def _floor(share: float) -> float:
    """Ray counts resources in ten-thousandths; never round up to more than there is."""
    return max(math.floor(share * 10_000 + 1e-6), 1) / 10_000  # 0.5005 times 10,000 is 5005
