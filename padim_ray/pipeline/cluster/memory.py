"""A worker's memory: large pages, and given back when it is freed."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h
_LARGE = 4 * 2**20
_LARGER_THAN_ACTIVATIONS = 12 * 2**20  # of 4 images at 256×256 in bfloat16
_EVERYTHING = 2**30
_HEAP = 64 * 2**20  # a thread's, from before: glibc unmaps it when empty, unless told to pad it


def prepare_memory(*, keep_activations: bool = False) -> None:
    """To be called before the process makes its first large tensor.

    Tensors of megabytes come and go with every batch. In pages of 4 KB their first touches take
    about as long as the arithmetic; PyTorch asks Linux for pages of 2 MB if it is told to.

    By default glibc keeps freed blocks of up to 32 MB in heaps, of which every thread may have its
    own, and whose fragments make an actor grow by a tenth over its first thousand images; now large
    blocks are given back, and threads share one heap.

    Args:
        keep_activations: for a process that runs a trunk. What each of its passes needs stays in
            the heap for the next one, instead of being given back and cleared again by the kernel,
            which takes a tenth of the actor's time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _tell_glibc("mallopt", _M_ARENA_MAX, 1)
    if keep_activations:
        _tell_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGER_THAN_ACTIVATIONS)
        _tell_glibc("mallopt", _M_TRIM_THRESHOLD, _EVERYTHING)
        _tell_glibc("mallopt", _M_TOP_PAD, _HEAP)
    else:
        _tell_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def give_back_memory() -> None:
    """To be called at the end of a task with many tensors, whose process stays for the next one.

    Freed blocks below the size that `prepare_memory` sets stay in the heap: hundreds of MB.
    """
    _tell_glibc("malloc_trim", 0)


def _tell_glibc(name: str, *arguments: int) -> None:
    """Call a function of its allocator; other C libraries have none such."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
