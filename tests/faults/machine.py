"""Where a process runs: on this machine, or on one of a test's network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """An address, and the command that starts other commands where it is."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOCALHOST = Machine()
