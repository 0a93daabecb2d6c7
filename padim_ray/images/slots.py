"""Slots: unnamed files in memory through which two processes exchange megabytes.

Unlike with a pipe, the writer doesn't wait until the other process reads.
"""

import os
import tempfile
from typing import BinaryIO


def open_slot() -> BinaryIO:
    """Open a new slot. It vanishes with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("padim-ray-slot"), "r+b", 0)
    return tempfile.TemporaryFile(buffering=0)  # not Linux: on disk


def write_slot(slot: int, content: bytes | memoryview) -> None:
    """Write bytes to the start of a slot, given by its file descriptor."""
    rest, offset = memoryview(content), 0
    while rest:
        count = os.pwrite(slot, rest, offset)
        rest, offset = rest[count:], offset + count


def read_slot(slot: int, buffer: memoryview) -> None:
    """Fill a buffer of bytes from the start of a slot, given by its file descriptor.

    Raises:
        EOFError: if the slot holds fewer bytes.
    """
    offset = 0
    while buffer:
        count = os.preadv(slot, [buffer], offset)
        if not count:
            raise EOFError
        buffer, offset = buffer[count:], offset + count
