"""Landlock: restricts a process to reading the paths that it names. Needs Linux 5.13."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls; the same numbers on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_PATH_BENEATH = 1
_SCOPES = 0b11  # abstract unix sockets and signals


def abi() -> int:
    """The version of Landlock in this kernel; 0 if it has none, or if it is disabled."""
    if sys.platform != "linux":
        return 0
    version: int = _libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def restrict(readable: Iterable[str], listable: Iterable[str] = ()) -> None:
    """Forbid to write, execute and connect, and to read anything except the paths `readable` and everything below them.

    listable: directories that may also be listed, with all directories below them. The restriction holds for the
    calling thread and for threads and processes that it starts, so call this before any other thread starts, and after
    no_new_privs is set. Raises OSError if the kernel refuses.
    """
    version = abi()
    files = (1 << 13) - 1
    files |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    network = 0b11 if version >= 4 else 0  # bind and connect, with TCP
    scopes = _SCOPES if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("<QQQ", files, network, scopes)[:size]
    rules = _call(_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE)
        for path in listable:
            _allow(rules, path, _READ_DIR)
        _call(_RESTRICT, rules, ctypes.c_uint32(0))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, access: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = struct.pack("<Qi", access, beneath)  # packed: 12 bytes
        _call(_ADD, rules, ctypes.c_int(_PATH_BENEATH), ctypes.c_char_p(rule), ctypes.c_uint32(0))
    finally:
        os.close(beneath)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock: {os.strerror(error)}")
    return result
