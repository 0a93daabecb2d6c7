"""Pods of the manifests as containers: podman in the place of Kubernetes and of KubeRay."""

import os
import resource
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.machine import Machine
from tests.faults.processes import PATIENCE
from tests.infra.containers.image import STORAGE
from tests.infra.manifests import Job, Pod, quantity

PODMAN = ("podman", *STORAGE, "--runtime=runc", "--cgroup-manager=cgroupfs")
MAX_PROCESSES = 30_000
PODMAN_FAILED = (125, 126)  # exit statuses of podman and of its runtime
SHELL = ("/bin/bash", "-c", "--")  # as KubeRay runs commands


@dataclass
class Containers:
    """The containers of a job's pods, which exist inside the `with` block.

    Attributes:
        image: name of the image.
        job: whose pods they are.
        settings: data of the ConfigMap and of the Secret.
        folder: for the pods' volumes.
        token: of the Ray cluster that the next containers belong to.
    """

    image: str
    job: Job
    settings: Mapping[str, str]
    folder: Path
    token: str = ""
    _running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __enter__(self) -> "Containers":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self, pod: Pod, machine: Machine, command: str, **environment: str) -> str:
        """Start a pod's container on a machine of the network; return the container's name."""
        name = f"{self.job.name}-{pod.group}-{secrets.token_hex(3)}"
        with (self.folder / name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [
                    *(*PODMAN, "run", f"--name={name}", f"--hostname={name}"),
                    # no server answers, and Ray must not wait for one
                    *(f"--add-host={name}:{machine.address}", "--dns=127.0.0.1"),
                    *self._options(pod, machine, environment),
                    *(self.image, *SHELL, command),
                ],
                stdout=log,
                stderr=log,
            )
        return name

    def _options(self, pod: Pod, machine: Machine, environment: Mapping[str, str]) -> list[str]:
        container, security = pod.container, pod.container["securityContext"]
        users = pod.spec["securityContext"]
        limits = {
            # podman's defaults are higher than what is allowed where this machine is one itself
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            "nproc": MAX_PROCESSES,
        }
        assert users["seccompProfile"] == {"type": "RuntimeDefault"}  # podman's default as well
        assert security["capabilities"] == {"drop": ["ALL"]}
        options = [
            f"--network=ns:{machine.prefix[1].removeprefix('--net=')}",
            f"--user={users['runAsUser']}:{users['runAsGroup']}",
            f"--memory={int(quantity(container['resources']['limits']['memory']))}b",
            # Kubernetes' weight of a request; the whole container would count as one process
            f"--cpu-shares={int(1024 * quantity(container['resources']['requests']['cpu']))}",
            "--cap-drop=ALL",
            *(f"--ulimit={limit}={value}:{value}" for limit, value in limits.items()),
        ]
        if security["readOnlyRootFilesystem"]:
            options += ["--read-only", "--read-only-tmpfs=false"]
        if not security["allowPrivilegeEscalation"]:
            options.append("--security-opt=no-new-privileges")
        for mount in container["volumeMounts"]:
            volume = pod.volumes[mount["name"]]["emptyDir"]
            if volume.get("medium") == "Memory":
                assert mount["mountPath"] == "/dev/shm"
                options.append(f"--shm-size={int(quantity(volume['sizeLimit']))}b")
            else:
                options.append(f"--volume={self._empty_dir()}:{mount['mountPath']}")
        set_here = {name: value for name, value in pod.environment.items() if value is not None}
        inherited = self.settings if "envFrom" in container else {}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        everything = {**inherited, **set_here, **token, **environment}
        return options + [f"--env={name}={value}" for name, value in everything.items()]

    def _empty_dir(self) -> Path:
        """A directory like an emptyDir's: everybody may write there."""
        directory = self.folder / secrets.token_hex(4)
        directory.mkdir()
        os.chmod(directory, 0o777)
        return directory

    def execute(self, name: str, *command: str) -> subprocess.CompletedProcess:
        """Run a command in a container, as `kubectl exec` does."""
        return subprocess.run([*PODMAN, "exec", name, *command], capture_output=True, text=True)

    def wait(self, name: str) -> int:
        """Wait for the end of a container; return its exit status."""
        return self._running[name].wait()

    def is_running(self, name: str) -> bool:
        """Whether a container is running. Skips the test if podman couldn't start it."""
        status = self._running[name].poll()
        if status in PODMAN_FAILED:
            pytest.skip(f"podman can't run containers here: {self.logs(name)}")
        return status is None

    def logs(self, name: str) -> str:
        return (self.folder / name).read_text()

    def kill(self, name: str) -> None:
        """Kill a container's processes at once, as the loss of its node would."""
        # a busy machine may be too slow for podman's own books, so its answer doesn't count
        subprocess.run([*PODMAN, "kill", "--signal=KILL", name], capture_output=True)
        self._running[name].wait(PATIENCE)

    def remove(self) -> None:
        """Kill and remove all containers."""
        for name, process in self._running.items():
            subprocess.run([*PODMAN, "rm", "--force", "--time=0", name], capture_output=True)
            process.wait(PATIENCE)
        self._running.clear()


def start_ray(pod: Pod, address: str | None = None) -> str:
    """The command that KubeRay 1.7 makes of a pod's rayStartParams (generateRayStartCommand).

    Args:
        pod: of a head or of workers.
        address: of the head, for workers.
    """
    options = {
        **({"address": f"{address}:6379"} if address else {"dashboard-host": "0.0.0.0"}),
        **{"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"},
        **pod.start,
    }
    # the autoscaler, whose container needs Kubernetes, is not part of the head's
    flags = ["--block"] if address else ["--head", "--block", "--no-monitor"]
    words = [*flags, *(f"--{name}={value}" for name, value in options.items())]
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {' '.join(words)}"


def submit(job: Job, dashboard: str, name: str) -> str:
    """The command of KubeRay's submitter (BuildJobSubmitCommand), which submits at most once."""
    ray, entrypoint = f"--address {dashboard}", job.spec["entrypoint"].strip()
    return (
        f"if ! ray job status {ray} {name} >/dev/null 2>&1 ; then "
        f"ray job submit {ray} --no-wait --submission-id {name} -- {entrypoint} ; "
        f"fi ; ray job logs {ray} --follow {name}"
    )
