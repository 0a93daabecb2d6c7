"""Stop a job on SIGTERM or Ctrl-C: at once, keeping what is committed."""

import os
import signal
import threading
from types import FrameType

GRACE = 20.0  # seconds; below Kubernetes' grace period (30 by default), after which it kills


class StopSignal:
    """A signal handler that interrupts the main thread, and ends the process within `GRACE`.

    The interrupt unwinds the job, which releases its claims and shuts Ray down. If that takes
    longer than `GRACE`, for instance because the storage doesn't answer, the process exits without
    it. What is committed doesn't depend on it.
    """

    def __init__(self) -> None:
        self.number = signal.SIGINT

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number == number:
            return  # a repeated signal
        self.number = signal.Signals(number)
        end = threading.Timer(GRACE, os._exit, [self.exit_code])
        end.daemon = True
        end.start()
        # Ray's calls let this exception through, but none of our own
        raise KeyboardInterrupt
