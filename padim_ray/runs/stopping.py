"""Ending a job when it is told to: at once, with what is committed kept."""

import os
import signal
import threading
from types import FrameType

GRACE = 20.0  # seconds; Kubernetes kills what hasn't ended within its grace period (30 by default)


class StopSignal:
    """A signal handler that interrupts the main thread, and sees to it that the process ends.

    An interrupt unwinds the job: claims are released, Ray is shut down. Should that take longer
    than `GRACE`, as when the storage doesn't answer, the process ends all the same: nothing that is
    committed depends on it.
    """

    def __init__(self) -> None:
        self.number = signal.SIGINT

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """As shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number == number:
            return  # told twice
        self.number = signal.Signals(number)
        end = threading.Timer(GRACE, os._exit, [self.exit_code])
        end.daemon = True
        end.start()
        # not an exception of our own: Ray's calls only let this one through
        raise KeyboardInterrupt
