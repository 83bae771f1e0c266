"""Which means of confinement this machine has, found by trying them. Knows nothing of losses."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache

from tinkerbell_server.sandbox.isolation import bubblewrap, landlock, seccomp
from tinkerbell_server.sandbox.isolation.readable_paths import Readable


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One of them: whether it works here, and what was found."""

    name: str
    works: bool
    found: str


def interpreter() -> list[str]:
    """The Python that runs here, alone: no environment, no site-packages, no current directory."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B"]


def examine(readable: Readable) -> list[Mechanism]:
    """bubblewrap, Landlock and seccomp, in this order."""
    return [_bubblewrap(readable), _landlock(), _seccomp()]


def enough(found: list[Mechanism]) -> bool:
    """Whether uploads can be confined: system calls, and the file system by one of two."""
    works = {each.name: each.works for each in found}
    return works["seccomp"] and (works["bubblewrap"] or works["landlock"])


@cache
def _bubblewrap(readable: Readable) -> Mechanism:
    version = bubblewrap.version()
    if not version:
        return Mechanism("bubblewrap", False, "not installed: apt install bubblewrap")
    python = interpreter()
    files = [*readable.files, python[0]]
    refusal = bubblewrap.refusal(files, [*python, "-c", "pass"])
    if refusal is not None:
        return Mechanism("bubblewrap", False, f"{version}, but {refusal}; it needs user namespaces and its own /proc")
    return Mechanism("bubblewrap", True, f"{version}: namespaces of its own (user, pid, network, ipc, mount)")


def _landlock() -> Mechanism:
    version = landlock.abi()
    if not version:
        return Mechanism("landlock", False, "not in this kernel, or off: Linux 5.13 and later, lsm=landlock")
    return Mechanism("landlock", True, f"ABI {version}")


def _seccomp() -> Mechanism:
    version = seccomp.version()
    if not version:
        return Mechanism("seccomp", False, "libseccomp.so.2 is not installed: apt install libseccomp2")
    return Mechanism("seccomp", True, f"libseccomp {version}")
