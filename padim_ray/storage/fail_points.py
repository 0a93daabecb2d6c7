"""Fail points: failures that tests ask for, so that what should survive them is really tried.

The environment variable PADIM_RAY_FAIL_POINTS is a comma-separated list of names. Without it, as in
every run but a test's, none of this does anything.

- `decoder`: encoded images that contain the ASCII text `padim-ray-test:segfault`,
  `padim-ray-test:hang` or `padim-ray-test:oom-kill` do that to the process that decodes them.
- Every name that `kill_at` is called with kills the process that gets there.
"""

import os
import signal

VARIABLE = "PADIM_RAY_FAIL_POINTS"


def is_on(name: str) -> bool:
    """Whether the environment asks for this fail point."""
    return name in os.environ.get(VARIABLE, "").split(",")


def kill_at(name: str) -> None:
    """End this process as the kernel ends one that runs out of memory, if the environment asks."""
    if is_on(name):
        os.kill(os.getpid(), signal.SIGKILL)
