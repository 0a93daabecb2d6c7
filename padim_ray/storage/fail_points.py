"""Fail points: failures that tests switch on to try recovery for real.

The environment variable PADIM_RAY_FAIL_POINTS is a comma-separated list of names. Only tests set
it; without it, fail points do nothing.

- `decoder`: an encoded image that contains the ASCII text `padim-ray-test:segfault`,
  `padim-ray-test:hang` or `padim-ray-test:oom-kill` does that to the process that decodes it.
  With `padim-ray-test:memory` it asks for 8 GiB.
- Any name passed to `kill_at`: the process is killed when it gets there.
"""

import os
import signal

VARIABLE = "PADIM_RAY_FAIL_POINTS"


def is_on(name: str) -> bool:
    """Whether the environment switches this fail point on."""
    return name in os.environ.get(VARIABLE, "").split(",")


def kill_at(name: str) -> None:
    """If this fail point is on, kill this process as the kernel does when memory runs out."""
    if is_on(name):
        os.kill(os.getpid(), signal.SIGKILL)
