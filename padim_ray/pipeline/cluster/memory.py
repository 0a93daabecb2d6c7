"""Memory of worker processes: large pages, and freed memory returned to the system."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h
_LARGE = 4 * 2**20
_LARGER_THAN_ACTIVATIONS = 12 * 2**20  # activations of 4 images at 256×256 in bfloat16
_NEVER_TRIM = 2**30
_HEAP = 64 * 2**20  # glibc unmaps a thread's older heap when it is empty, unless padded to this


def prepare_memory(*, keep_activations: bool = False) -> None:
    """Configure the allocators. Call it before the process makes its first large tensor.

    Tensors of megabytes are allocated and freed with every batch. In pages of 4 KB, touching them
    for the first time takes about as long as the arithmetic, so PyTorch is told to ask Linux for
    pages of 2 MB.

    By default glibc keeps freed blocks of up to 32 MB in heaps, and every thread may have its own.
    Fragmentation then makes an actor grow by a tenth over its first thousand images. With these
    settings large blocks are returned to the system, and threads share one heap.

    Args:
        keep_activations: for a process that runs a trunk. The memory of one pass stays in the heap
            for the next, which saves a tenth of the actor's time: the kernel would have to clear it
            again.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _call_glibc("mallopt", _M_ARENA_MAX, 1)
    if keep_activations:
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGER_THAN_ACTIVATIONS)
        _call_glibc("mallopt", _M_TRIM_THRESHOLD, _NEVER_TRIM)
        _call_glibc("mallopt", _M_TOP_PAD, _HEAP)
    else:
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def give_back_memory() -> None:
    """Return the heap's free blocks. Call it at the end of a task that used many tensors.

    The process stays alive for the next task. Freed blocks below the size that `prepare_memory`
    sets would stay in its heap, hundreds of MB.
    """
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc's allocator; other C libraries don't have them."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
