"""bubblewrap: runs a program in its own namespaces, with a root file system that holds only the files it may read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from tinkerbell_server.sandbox.isolation.readable_paths import PROCESSORS

_SECONDS = 20.0


def command(files: Sequence[str], program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line that runs `program` in new user, pid, network, ipc, uts, cgroup and mount namespaces.

    files: the files and directories that exist there, read-only.
    """
    line = ["bwrap", "--unshare-all", "--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"]
    for name, value in environment.items():
        line += ["--setenv", name, value]
    if os.getuid() == 0:
        line += ["--uid", "65534", "--gid", "65534"]
    for path in sorted(files):  # a directory before its entries
        # /lib is a link on most systems and must stay one, because the path of the dynamic loader starts with it
        line += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    line += ["--ro-bind-try", PROCESSORS, PROCESSORS, "--proc", "/proc", "--dev", "/dev"]
    # only devices that store nothing can be written
    line += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*line, "--", *program]


def version() -> str:
    """The installed version, or an empty string."""
    if shutil.which("bwrap") is None:
        return ""
    try:
        done = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().rpartition(" ")[2]


def find_problem(files: Sequence[str], program: Sequence[str]) -> str | None:
    """Run `program`, which should exit with status 0, under bubblewrap; the reason if it fails, otherwise None."""
    try:
        done = subprocess.run(
            command(files, program, {}), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it exits with status {done.returncode}"
