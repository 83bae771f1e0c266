"""Confines the calling process before it runs third-party code, and tests the confinement."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial

from tinkerbell_server.sandbox.isolation import landlock, seccomp

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


def lock_down(readable: Sequence[str], listable: Sequence[str], memory: int) -> None:
    """Drop privileges and limit files, memory and system calls of this process, which must have a single thread.

    readable, listable: as in `landlock.restrict`; not used if the kernel has no Landlock. memory: bytes that the
    process may allocate in addition to those it has. Raises OSError if the kernel refuses a step.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    _set_limits(memory)
    if landlock.abi():
        landlock.restrict(readable, listable)
    seccomp.restrict()


def _set_limits(memory: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, limit in {
        resource.RLIMIT_AS: used + memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 64,
    }.items():
        resource.setrlimit(kind, (limit, limit))


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")


def find_escapes(hidden: Sequence[str]) -> list[str]:
    """Attempt each operation that must be impossible in this process; the operations that succeed.

    hidden: files and directories that it must not be able to open.
    """
    attempts: dict[str, Callable[[], object]] = {
        "create a socket": lambda: socket.socket().close(),
        "create a unix socket": lambda: socket.socketpair(),
        "start a process": _fork,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "signal another process": lambda: os.kill(os.getppid(), 0),
        "write to /tmp": lambda: os.open("/tmp/tinkerbell-escape", os.O_WRONLY | os.O_CREAT),
        "write to /dev/shm": lambda: os.open("/dev/shm/tinkerbell-escape", os.O_WRONLY | os.O_CREAT),
        "create a file in memory": lambda: os.memfd_create("escape"),
        "read its parent's environment": lambda: os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
        "change its limits": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (63, 63)),
        **{f"read {path}": partial(os.open, path, os.O_RDONLY) for path in hidden},
    }
    escapes = []
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, ValueError):
            attempt()
            escapes.append(name)
    return escapes


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
