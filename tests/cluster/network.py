"""A network of machines on this host: network namespaces that are connected by a switch.

Nobody has to clean up: a namespace lives as long as a process in it, and its cables with it.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.machine import LOCALHOST, Machine
from tests.faults.processes import PATIENCE, wait_until

# ends with the process that started it, when its input closes
_INHABITANT = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@dataclass
class Network:
    """`outside`: this process's own address in the network."""

    subnet: str
    outside: Machine
    _switch: Machine
    _machines: ExitStack
    _count: int = 1

    def add_machine(self) -> Machine:
        self._count += 1
        number, inhabitant = self._count, self._machines.enter_context(_namespace())
        machine = Machine(f"{self.subnet}.{number}", _enter(inhabitant))
        _run(self._switch, "ip", "link", "add", f"port{number}", "type", "veth", "peer", "eth0")
        _run(self._switch, "ip", "link", "set", "eth0", "netns", str(inhabitant))
        _run(self._switch, "ip", "link", "set", f"port{number}", "master", "switch", "up")
        _run(machine, "ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        _run(machine, "ip", "link", "set", "eth0", "up")
        # leads nowhere, but Ray needs a route to find its own address
        _run(machine, "ip", "route", "add", "default", "via", self.outside.address)
        return machine

    def unplug(self, machine: Machine) -> None:
        """Pull its cable: its packets are lost, and no connection is closed."""
        number = machine.address.rpartition(".")[2]
        _run(self._switch, "ip", "link", "set", f"port{number}", "down")


@contextmanager
def network() -> Iterator[Network]:
    """A network that exists until the block ends.

    Raises:
        OSError: if it can't be made, for lack of rights or of the command `ip`.
    """
    with ExitStack() as machines:
        inhabitant = machines.enter_context(_namespace())
        switch = Machine(prefix=_enter(inhabitant))
        _run(switch, "ip", "link", "add", "switch", "type", "bridge")
        _run(switch, "ip", "link", "set", "switch", "up")
        number = random.randrange(2**16)
        subnet = f"10.{number >> 8}.{number & 255}"
        outside = Machine(f"{subnet}.1")
        cable = f"padim-{number:04x}"
        _run(LOCALHOST, "ip", "link", "add", cable, "type", "veth", "peer", "outside")
        _run(LOCALHOST, "ip", "link", "set", "outside", "netns", str(inhabitant))
        _run(switch, "ip", "link", "set", "outside", "master", "switch", "up")
        _run(LOCALHOST, "ip", "address", "add", f"{outside.address}/24", "dev", cable)
        _run(LOCALHOST, "ip", "link", "set", cable, "up")
        yield Network(subnet, outside, switch, machines)


@contextmanager
def _namespace() -> Iterator[int]:
    """The ID of a process in a network namespace of its own."""
    own = Path("/proc/self/ns/net").readlink()
    process = subprocess.Popen(
        ["unshare", "--net", "--", *_INHABITANT],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        there = Path(f"/proc/{process.pid}/ns/net")
        wait_until(lambda: process.poll() is not None or there.readlink() != own, PATIENCE)
        if process.poll() is not None:
            raise OSError(process.stderr.read().decode())
        _run(Machine(prefix=_enter(process.pid)), "ip", "link", "set", "lo", "up")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def _enter(inhabitant: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{inhabitant}/ns/net", "--")


def _run(machine: Machine, *command: str) -> None:
    done = subprocess.run([*machine.prefix, *command], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
