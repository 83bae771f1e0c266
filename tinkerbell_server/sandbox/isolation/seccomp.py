"""seccomp: a process gives up every system call but those that arithmetic needs. Through libseccomp, if it is there.

Bound here by ctypes: pyseccomp had its last release in 2021 and starts a compiler to find the library when imported.
"""

from __future__ import annotations

import ctypes
import errno
import os

_LIBRARY = "libseccomp.so.2"
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EQ, _MASKED_EQ = 4, 7
_CLONE_THREAD = 0x10000

# fmt: off
PLAIN = (
    "read", "write", "readv", "writev", "pread64", "preadv", "close", "fstat", "newfstatat", "stat", "lstat",
    "statx", "lseek", "getdents64", "getcwd", "open", "openat", "access", "faccessat", "faccessat2", "readlink",
    "readlinkat", "fadvise64", "mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "futex", "set_robust_list",
    "rseq", "sched_yield", "sched_getaffinity", "getcpu", "membarrier", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "sigaltstack", "exit", "exit_group", "restart_syscall", "clock_gettime", "clock_getres",
    "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times", "getpid", "gettid", "getppid", "getuid",
    "geteuid", "getgid", "getegid", "getrusage", "getrlimit", "sysinfo", "uname", "getrandom", "recvfrom",
    "recvmsg", "poll", "ppoll", "select", "pselect6",
)
"""Allowed with any arguments. No call here makes a socket, a process, a file or a signal to another process."""
# fmt: on


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


_GUARDED: dict[str, list[tuple[_Argument, ...]]] = {
    # threads, not processes
    "clone": [(_Argument(0, _MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD),)],
    # send() is sendto without an address
    "sendto": [(_Argument(4, _EQ, 0, 0),)],
    # getrlimit is prlimit64 of this process without a new limit
    "prlimit64": [(_Argument(0, _EQ, 0, 0), _Argument(2, _EQ, 0, 0))],
    "prctl": [(_Argument(0, _EQ, 15, 0),)],  # PR_SET_NAME, of a thread
    # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GET_SEALS: no F_SETOWN, which sends signals
    "fcntl": [(_Argument(1, _EQ, command, 0),) for command in (1, 2, 3, 1030, 1034)],
}

# glibc falls back to a call whose flags a filter can see
_NOT_HERE = ("clone3",)


def version() -> str:
    """libseccomp's version; empty where it cannot be loaded."""
    try:
        library = _load()
    except OSError:
        return ""

    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    library.seccomp_version.restype = ctypes.POINTER(Version)
    found = library.seccomp_version().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def restrict() -> None:
    """Any call but those above fails with EPERM from here on. Needs no_new_privs. Raises OSError where it cannot be."""
    library = _load()
    context = library.seccomp_init(ctypes.c_uint32(_ERRNO | errno.EPERM))
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init")
    try:
        for name in PLAIN:
            _add(library, context, _ALLOW, name, ())
        for name, choices in _GUARDED.items():
            for arguments in choices:
                _add(library, context, _ALLOW, name, arguments)
        for name in _NOT_HERE:
            _add(library, context, _ERRNO | errno.ENOSYS, name, ())
        _check(library.seccomp_load(ctypes.c_void_p(context)), "seccomp_load")
    finally:
        library.seccomp_release(ctypes.c_void_p(context))


def _add(library: ctypes.CDLL, context: int, action: int, name: str, arguments: tuple[_Argument, ...]) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # not on this architecture, or not known to this version
        return
    array = (_Argument * max(1, len(arguments)))(*arguments)
    result = library.seccomp_rule_add_array(
        ctypes.c_void_p(context), ctypes.c_uint32(action), number, ctypes.c_uint(len(arguments)), array
    )
    _check(result, f"seccomp_rule_add {name}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def _load() -> ctypes.CDLL:
    # not find_library: it starts ldconfig and a compiler
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    return library
