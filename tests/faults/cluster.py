"""A Ray cluster of several node processes on this machine, whose processes tests may kill.

Every node is a `ray start --block` in a session of its own. Its raylet and workers stay in that
session whoever dies first, so they can be found, and none is left at the end.
"""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.faults.machine import LOCALHOST, Machine
from tests.faults.processes import (
    PATIENCE,
    REPOSITORY,
    Guard,
    Process,
    kill_session,
    list_processes,
    wait_until,
)

BIN = Path(sys.executable).parent
OBJECT_STORE_BYTES = 200_000_000

# By default Ray checks nodes every 3 seconds, and silent connections every 5 minutes for up to 2.
# Here it checks more often, so that losses are noticed soon.
NOTICE_SOON = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "10",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
_ACTORS = re.compile(r"ray::MapWorker")
_IDLE = re.compile(r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent)")
_HELPERS = re.compile(r"ray::(_StatsActor|_Autoscaling|ActorLocationTracker)")


class Node:
    """A node of the cluster: all processes in the session that `ray start` leads."""

    def __init__(self, starter: subprocess.Popen, log: Path, machine: Machine) -> None:
        self.starter, self.log, self.machine = starter, log, machine

    @property
    def is_running(self) -> bool:
        return self.starter.poll() is None

    def processes(self) -> list[Process]:
        return list_processes(self.starter.pid)

    def actors(self) -> list[Process]:
        """The pipelines' actors, which hold the trunk."""
        return [process for process in self.processes() if _ACTORS.match(process.title)]

    def task_workers(self) -> list[Process]:
        """Workers that are running a task."""
        others = (_IDLE, _ACTORS, _HELPERS)
        return [
            process
            for process in self.processes()
            if process.title.startswith("ray::")
            and not any(pattern.match(process.title) for pattern in others)
        ]

    def raylets(self) -> list[Process]:
        """The node's raylet, if it is running."""
        return [p for p in self.processes() if p.title.partition(" ")[0].endswith("/raylet")]

    def wait_started(self) -> None:
        wait_until(
            lambda: "Ray runtime started" in self.log.read_text() or not self.is_running, PATIENCE
        )
        if not self.is_running:
            raise RuntimeError(f"The node didn't start:\n{self.log.read_text()}")

    def stop(self) -> None:
        """Kill every process of the node, until none is left."""
        kill_session(self.starter.pid)
        self.starter.wait()


class Cluster:
    """A head without CPUs and some workers, which exist inside the `with` block.

    The head holds the cluster's state and the drivers' raylet, and is never killed. Any of `nodes`
    may be killed.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        cpus: int = 2,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        head: Machine = LOCALHOST,
        dashboard: bool = False,
        head_options: Callable[[str], Sequence[str]] = lambda address: (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Args:
        workers: number of worker nodes.
        cpus: logical CPUs of each worker, possibly more than the machine has.
        object_store_bytes: size of each node's object store.
        head: the machine of the head and the drivers.
        dashboard: whether there is a dashboard, which submitting and inspecting jobs needs.
        head_options: further options of `ray start` on the head, given its address.
        environment: further variables for all nodes and drivers.
        """
        self.cpus, self.object_store_bytes = cpus, object_store_bytes
        self._head, self._head_options, self._has_dashboard = head, head_options, dashboard
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **NOTICE_SOON,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
        }
        self.nodes: list[Node] = []
        self._started: list[subprocess.Popen] = []
        self._workers = workers

    def __enter__(self) -> "Cluster":
        # pytest's directories are too deep: a socket's path may have 107 bytes
        self.directory = Path(tempfile.mkdtemp(prefix="faults-"))
        self._guard = Guard(self.directory)
        try:
            port = free_port()
            self.address = f"{self._head.address}:{port}"
            dashboard = free_port()
            self.dashboard = f"http://{self._head.address}:{dashboard}"
            self._start(
                self._head,
                *("--head", f"--port={port}", f"--ray-client-server-port={free_port()}"),
                *("--num-cpus=0", f"--temp-dir={self.directory}"),
                *self._head_options(self.address),
                f"--include-dashboard={str(self._has_dashboard).lower()}",
                *(f"--dashboard-host={self._head.address}", f"--dashboard-port={dashboard}"),
            )
            if self._has_dashboard:
                wait_until(lambda: answers(self._head.address, dashboard), PATIENCE)
            for _ in range(self._workers):
                self.add_node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.clean_up()
        for process in self._started:
            process.wait()

    def add_node(self, machine: Machine = LOCALHOST, *options: str) -> Node:
        """Start a worker node and wait for it; two at a time would use the same socket.

        Args:
            machine: the machine to start it on.
            options: further options of `ray start`.
        """
        node = self._start(
            machine, f"--address={self.address}", f"--num-cpus={self.cpus}", *options
        )
        self.nodes.append(node)
        return node

    def remove(self, node: Node) -> None:
        """Kill the remaining processes of a node, and forget it."""
        node.stop()
        self.nodes.remove(node)

    def restore(self) -> None:
        """Replace the nodes that died."""
        for node in [node for node in self.nodes if not (node.is_running and node.raylets())]:
            self.remove(node)
        while len(self.nodes) < self._workers:
            self.add_node()

    def _start(self, machine: Machine, *arguments: str) -> Node:
        log = self.directory / f"node-{secrets.token_hex(4)}.log"
        with log.open("w") as output:
            starter = subprocess.Popen(
                [
                    *(*machine.prefix, BIN / "ray", "start", "--block"),
                    f"--node-ip-address={machine.address}",
                    # any free ports instead of fixed ones, which the nodes would share
                    *("--min-worker-port=0", "--max-worker-port=0"),
                    f"--dashboard-agent-listen-port={free_port()}",
                    f"--object-store-memory={self.object_store_bytes}",
                    *arguments,
                ],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._watch(starter)
        node = Node(starter, log, machine)
        node.wait_started()
        return node

    def start_driver(
        self, command: list[str], output: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a job as a process of its own, whose output goes to a file."""
        with output.open("ab") as file:
            driver = subprocess.Popen(
                [*self._head.prefix, *command],
                cwd=REPOSITORY,
                env=self.environment | dict(environment or {}),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._watch(driver)
        return driver

    def _watch(self, process: subprocess.Popen) -> None:
        self._guard.watch(process.pid)
        self._started.append(process)

    def spilled(self) -> list[str]:
        """Names of the objects that are spilled to disk."""
        return [path.name for path in self.directory.glob("session_*/ray_spilled_objects*/*")]

    def job(self, name: str, *arguments: object) -> list[str]:
        """The command that runs jobs/NAME.py on this cluster."""
        script = [sys.executable, f"jobs/{name}.py", "--address", self.address]
        return [*script, *map(str, arguments)]


def answers(address: str, port: int) -> bool:
    """Whether a server listens at the port."""
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
