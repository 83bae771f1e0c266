"""What a process does to itself before it runs somebody else's code, and the proof that it holds."""

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
    """Give up privileges, the file system, memory beyond `memory` more bytes, and system calls. Single-threaded only.

    Landlock is left out where the kernel has none. Raises OSError where a step is refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    _limits(memory)
    if landlock.abi():
        landlock.restrict(readable, listable)
    seccomp.restrict()


def _limits(memory: int) -> None:
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    for what, limit in {
        resource.RLIMIT_AS: held + memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 64,
    }.items():
        resource.setrlimit(what, (limit, limit))


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")


def escapes(outside: Sequence[str]) -> list[str]:
    """What this process can still do and should not, each tried here and now. outside: files it should not read."""
    attempts: dict[str, Callable[[], object]] = {
        "make a socket": lambda: socket.socket().close(),
        "make a unix socket": lambda: socket.socketpair(),
        "start a process": _fork,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "signal another process": lambda: os.kill(os.getppid(), 0),
        "write to /tmp": lambda: os.open("/tmp/tinkerbell-escape", os.O_WRONLY | os.O_CREAT),
        "write to /dev/shm": lambda: os.open("/dev/shm/tinkerbell-escape", os.O_WRONLY | os.O_CREAT),
        "make a file in memory": lambda: os.memfd_create("escape"),
        "read its parent's environment": lambda: os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
        "raise its memory limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (63, 63)),
        **{f"read {path}": partial(os.open, path, os.O_RDONLY) for path in outside},
    }
    found = []
    for what, attempt in attempts.items():
        with contextlib.suppress(OSError, ValueError):
            attempt()
            found.append(what)
    return found


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
