"""Objects that Ray's object store has no room for are spilled to disk: where, and how many fit."""

import os

from padim_ray.storage.disk import disk_usage, format_size

STORE_SHARE = 0.3
"""The share of a machine's memory that a Ray started there takes for its object store."""
DIRECTORY = "RAY_object_spilling_directory"
THRESHOLD = "RAY_local_fs_capacity_threshold"
MAKE_ROOM = f"Make room, or set {DIRECTORY} to a directory on a larger disk"


def spill_directory() -> str:
    """Where a Ray that is started on this machine spills objects to."""
    named = os.environ.get(DIRECTORY)
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return named or os.path.join(temporary, "ray")


def spill_room(directory: str) -> int:
    """Bytes that can be written there until the disk is as full as Ray allows."""
    total, free = disk_usage(directory)
    fullest = float(os.environ.get(THRESHOLD, 0.95))
    return max(0, round(free - (1 - fullest) * total))


def warn_of_spilling(at_once: int, store: int) -> str | None:
    """Say that this machine's disk is too small for the objects of a job; None if it isn't.

    Args:
        at_once: bytes of objects at the same time.
        store: size of the object store.
    """
    directory = spill_directory()
    room = spill_room(directory)
    if at_once - store <= room:
        return None
    return (
        f"has up to {format_size(at_once)} of objects at once, but Ray's object store holds "
        f"{format_size(store)}, and the disk of {directory} has room for {format_size(room)} more. "
        f"{MAKE_ROOM}"
    )


def default_store() -> int:
    """About the size of the object store of a Ray that is started on this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return round(STORE_SHARE * memory)
