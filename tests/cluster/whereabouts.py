"""Where tasks and actors ran, from Ray's own records."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.faults.cluster import Cluster

# runs in a process of its own that has the cluster's token
_ASK = """
import json, sys
from ray.util.state import list_nodes, list_tasks
how = {"address": sys.argv[1], "limit": 10_000, "detail": True}
nodes = {
    node.node_id: [node.node_ip, node.is_head_node, node.resources_total]
    for node in list_nodes(**how) if node.state == "ALIVE"
}
tasks = [
    [task.type, task.name, task.state, *nodes[task.node_id]]
    for task in list_tasks(**how) if task.node_id in nodes
]
print(json.dumps({"nodes": [resources for _, _, resources in nodes.values()], "tasks": tasks}))
"""


@dataclass(frozen=True)
class Ran:
    """A task or an actor's call, and where it ran.

    `kind`: "NORMAL_TASK" or "ACTOR_TASK". `name`: of the stage, of the function or of the actor's
    method: `submit` works, and `get_location` is called once by Ray Data, when the actor is made.
    """

    kind: str
    name: str
    state: str
    address: str
    is_on_head: bool
    resources: Mapping[str, float]

    @property
    def is_ours(self) -> bool:
        """Whether it belongs to the pipelines, and not to Ray Data's bookkeeping."""
        return not self.is_of_actor or self.name.startswith("MapWorker(")

    @property
    def is_of_actor(self) -> bool:
        return self.kind != "NORMAL_TASK"


def ask_where(cluster: Cluster) -> list[Ran]:
    """The tasks and calls of the pipelines that ran on nodes that are alive."""
    ran = [Ran(*row) for row in _ask(cluster)["tasks"]]
    return [one for one in ran if one.is_ours]


def ask_nodes(cluster: Cluster) -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return _ask(cluster)["nodes"]


def _ask(cluster: Cluster) -> dict[str, Any]:
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, cluster.dashboard],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout.splitlines()[-1])
