"""seccomp: restricts a process to the system calls that arithmetic needs. Uses the library libseccomp.

It is called through ctypes because pyseccomp was last released in 2021 and starts a compiler when it is imported.
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
ALLOWED = (
    "read", "write", "readv", "writev", "pread64", "preadv", "close", "fstat", "newfstatat", "stat", "lstat",
    "statx", "lseek", "getdents64", "getcwd", "open", "openat", "access", "faccessat", "faccessat2", "readlink",
    "readlinkat", "fadvise64", "mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "futex", "set_robust_list",
    "rseq", "sched_yield", "sched_getaffinity", "getcpu", "membarrier", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "sigaltstack", "exit", "exit_group", "restart_syscall", "clock_gettime", "clock_getres",
    "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times", "getpid", "gettid", "getppid", "getuid",
    "geteuid", "getgid", "getegid", "getrusage", "getrlimit", "sysinfo", "uname", "getrandom", "recvfrom",
    "recvmsg", "poll", "ppoll", "select", "pselect6",
)
"""Allowed with any arguments. None of these creates a socket, a process or a file, or signals another process."""
# fmt: on


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


_ALLOWED_WITH: dict[str, list[tuple[_Argument, ...]]] = {
    # only to start a thread
    "clone": [(_Argument(0, _MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD),)],
    # send() calls sendto without an address
    "sendto": [(_Argument(4, _EQ, 0, 0),)],
    # getrlimit() calls prlimit64 for this process, without a new limit
    "prlimit64": [(_Argument(0, _EQ, 0, 0), _Argument(2, _EQ, 0, 0))],
    "prctl": [(_Argument(0, _EQ, 15, 0),)],  # PR_SET_NAME
    # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GET_SEALS; not F_SETOWN, which can send signals
    "fcntl": [(_Argument(1, _EQ, command, 0),) for command in (1, 2, 3, 1030, 1034)],
}

# these fail with ENOSYS, after which glibc uses a call whose flags a filter can check
_ABSENT = ("clone3",)


def version() -> str:
    """The version of libseccomp; an empty string if it cannot be loaded."""
    try:
        library = _load()
    except OSError:
        return ""

    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    library.seccomp_version.restype = ctypes.POINTER(Version)
    version = library.seccomp_version().contents
    return f"{version.major}.{version.minor}.{version.micro}"


def restrict() -> None:
    """Let every other system call fail with EPERM. no_new_privs must be set. Raises OSError if this fails."""
    library = _load()
    context = library.seccomp_init(ctypes.c_uint32(_ERRNO | errno.EPERM))
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init")
    try:
        for name in ALLOWED:
            _add(library, context, _ALLOW, name, ())
        for name, choices in _ALLOWED_WITH.items():
            for arguments in choices:
                _add(library, context, _ALLOW, name, arguments)
        for name in _ABSENT:
            _add(library, context, _ERRNO | errno.ENOSYS, name, ())
        _check(library.seccomp_load(ctypes.c_void_p(context)), "seccomp_load")
    finally:
        library.seccomp_release(ctypes.c_void_p(context))


def _add(library: ctypes.CDLL, context: int, action: int, name: str, arguments: tuple[_Argument, ...]) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # absent on this architecture, or unknown to this version of libseccomp
        return
    array = (_Argument * max(1, len(arguments)))(*arguments)
    result = library.seccomp_rule_add_array(
        ctypes.c_void_p(context), ctypes.c_uint32(action), number, ctypes.c_uint(len(arguments)), array
    )
    _check(result, f"seccomp_rule_add {name}")


def _check(result: int, function: str) -> None:
    if result < 0:
        raise OSError(-result, f"{function}: {os.strerror(-result)}")


def _load() -> ctypes.CDLL:
    # find_library would start ldconfig and a compiler
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    return library
