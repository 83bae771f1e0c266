"""Detects which mechanisms can confine a process on this machine, by trying each of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache

from tinkerbell_server.sandbox.isolation import bubblewrap, landlock, seccomp
from tinkerbell_server.sandbox.isolation.readable_paths import ReadablePaths


@dataclass(frozen=True, slots=True)
class Mechanism:
    """The result for one mechanism. found: its version, or why it does not work."""

    name: str
    works: bool
    found: str


def interpreter() -> list[str]:
    """The command of this Python without environment variables, site-packages or the current directory."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B"]


def detect(paths: ReadablePaths) -> list[Mechanism]:
    """The results for bubblewrap, Landlock and seccomp, in this order."""
    return [_bubblewrap(paths), _landlock(), _seccomp()]


def sufficient(mechanisms: list[Mechanism]) -> bool:
    """Whether they confine a process: seccomp its system calls, and bubblewrap or Landlock its access to files."""
    works = {each.name: each.works for each in mechanisms}
    return works["seccomp"] and (works["bubblewrap"] or works["landlock"])


@cache
def _bubblewrap(paths: ReadablePaths) -> Mechanism:
    version = bubblewrap.version()
    if not version:
        return Mechanism("bubblewrap", False, "not installed: apt install bubblewrap")
    python = interpreter()
    problem = bubblewrap.find_problem([*paths.files, python[0]], [*python, "-c", "pass"])
    if problem is not None:
        return Mechanism(
            "bubblewrap", False, f"{version}, but {problem}; it needs user namespaces and must mount its own /proc"
        )
    return Mechanism("bubblewrap", True, f"{version}, with its own user, pid, network, ipc and mount namespaces")


def _landlock() -> Mechanism:
    version = landlock.abi()
    if not version:
        return Mechanism(
            "landlock",
            False,
            "not available: it needs Linux 5.13 or later, with landlock in the list of the boot parameter lsm",
        )
    return Mechanism("landlock", True, f"ABI {version}")


def _seccomp() -> Mechanism:
    version = seccomp.version()
    if not version:
        return Mechanism("seccomp", False, "libseccomp.so.2 is not installed: apt install libseccomp2")
    return Mechanism("seccomp", True, f"libseccomp {version}")
