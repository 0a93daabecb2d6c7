"""A machine that runs processes: this one, or one of a test's network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A machine: its address, and the prefix that runs a command there."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOCALHOST = Machine()
