"""Give up what decoding doesn't need, before the first byte of an image is read.

An image may exploit a fault of a library and so take over the process that decodes it. There it
finds no credentials, can't open a file or a socket, start a process or reach another one, and has
limited memory. It can only answer with wrong pixels.
"""

import ctypes
import os
import resource
import signal
from pathlib import Path

BASE_BYTES = 512 * 2**20  # the interpreter and its libraries take 140 MB of addresses
BYTES_PER_PIXEL = 40  # while decoding, turning and converting; twice what any kind takes
CPU_SECONDS = 3600  # of a child; then another takes over
_NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38  # prctl.h
_ALLOW, _REFUSE, _EQUAL = 0x7FFF0000, 0x00050000 | 1, 4  # seccomp.h; 1 is EPERM
_ALLOWED = """
    read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek close fstat
    mmap munmap mremap mprotect madvise brk futex sched_yield sched_getaffinity membarrier
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group
    clock_gettime clock_nanosleep nanosleep gettimeofday time getrandom getcpu getpid gettid rseq
"""
"""System calls on open files, memory, clocks and the process itself. None opens a file by name."""


class _Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("other", ctypes.c_uint64),
    )


def memory_for(max_pixels: int, max_bytes: int) -> int:
    """The memory that decoding may take, in bytes.

    Args:
        max_pixels: of an image.
        max_bytes: of an image's file, which is copied once.
    """
    return BASE_BYTES + BYTES_PER_PIXEL * max_pixels + 2 * max_bytes


def enter(memory: int) -> list[str]:
    """Give up privileges, for good. Only Linux has all of them to give up; elsewhere nothing is.

    Args:
        memory: addresses that the process may take, in bytes.

    Returns:
        The protections that this machine refuses, in words.
    """
    libc, libseccomp = ctypes.CDLL(None), _load_libseccomp()  # while files can still be opened
    # when memory runs out, kill this process first; Ray's workers have the same score
    Path("/proc/self/oom_score_adj").write_text("1000")
    missing = _leave_root() if os.geteuid() == 0 else []
    # A child that hangs doesn't notice the end of its input. The signal also comes when only the
    # parent's thread ends that started this process; then the next call starts another. A change of
    # user resets it.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_DUMPABLE, 0)  # no core dumps, and no debugger of the same user
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, memory),  # of slots
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays so; files and sockets can't be opened
    ):
        _limit(kind, limit)
    return missing + _filter_system_calls(libseccomp)


def _limit(kind: int, limit: int) -> None:
    _, most = resource.getrlimit(kind)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(kind, (limit, limit))


def _leave_root() -> list[str]:
    try:
        os.setgroups([])
        os.setresgid(*[_NOBODY] * 3)
        os.setresuid(*[_NOBODY] * 3)
    except OSError as error:  # a container without the capability, or without that user
        return [f"a user of its own ({error})"]
    return []


def _load_libseccomp() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None


def _filter_system_calls(libseccomp: ctypes.CDLL | None) -> list[str]:
    """Let the kernel refuse all system calls but `_ALLOWED`."""
    if libseccomp is None:
        return ["a filter of system calls (libseccomp isn't installed)"]
    libseccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(libseccomp.seccomp_init(_REFUSE))
    for name in _ALLOWED.split():  # those that an architecture lacks are ignored
        number = libseccomp.seccomp_syscall_resolve_name(name.encode())
        libseccomp.seccomp_rule_add_array(rules, _ALLOW, number, 0, None)
    own = _Comparison(0, _EQUAL, os.getpid(), 0)
    tgkill = libseccomp.seccomp_syscall_resolve_name(b"tgkill")  # `abort` sends a signal
    libseccomp.seccomp_rule_add_array(rules, _ALLOW, tgkill, 1, ctypes.byref(own))
    if code := libseccomp.seccomp_load(rules):
        return [f"a filter of system calls ({os.strerror(-code)})"]
    return []
