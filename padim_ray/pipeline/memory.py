"""Keeping an actor's memory flat."""

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 4 * 2**20


def return_freed_memory() -> None:
    """Have the C library give large blocks back to the system as soon as they are freed.

    By default glibc keeps freed blocks of up to 32 MB in its heap, whose fragments make an actor
    grow by a tenth over its first thousand images. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
