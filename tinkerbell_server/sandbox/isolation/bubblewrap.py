"""bubblewrap's command line: namespaces of its own and a root that holds only what may be read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from tinkerbell_server.sandbox.isolation.readable_paths import PROCESSORS

_SECONDS = 20.0


def command(files: Sequence[str], program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """`program` in user, pid, network, ipc, uts, cgroup and mount namespaces of its own, `files` read-only in them."""
    line = ["bwrap", "--unshare-all", "--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"]
    for name, value in environment.items():
        line += ["--setenv", name, value]
    if os.getuid() == 0:
        line += ["--uid", "65534", "--gid", "65534"]
    for path in sorted(files):  # a directory before what is in it
        # /lib is a link on most systems, and stays one: the loader's own path begins there
        line += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    line += ["--ro-bind-try", PROCESSORS, PROCESSORS, "--proc", "/proc", "--dev", "/dev"]
    # nothing can be written but to devices that keep nothing
    line += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*line, "--", *program]


def version() -> str:
    """Empty where it is not installed."""
    if shutil.which("bwrap") is None:
        return ""
    try:
        said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip().rpartition(" ")[2]


def refusal(files: Sequence[str], program: Sequence[str]) -> str | None:
    """Why `program`, which should end with status 0, does not run in it here; None where it does."""
    try:
        done = subprocess.run(
            command(files, program, {}), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"it exits with status {done.returncode}"
