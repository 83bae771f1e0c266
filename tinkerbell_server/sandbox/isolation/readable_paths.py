"""What of the disk a loss may read: the code it may import, and nothing else."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib")
PROCESSORS = "/sys/devices/system/cpu"
LOADER_CACHE = "/etc/ld.so.cache"


@dataclass(frozen=True, slots=True)
class Readable:
    """imports: sys.path of the sandbox. files: what may be read, files and whole directories. names: directories whose
    entries may be listed, though not all of them read.
    """

    imports: tuple[str, ...]
    files: tuple[str, ...]
    names: tuple[str, ...]


def readable(hidden: Iterable[str] = ()) -> Readable:
    """The roots of sys.path here, editable installs too, without the current directory, dot files and what is `hidden`.

    hidden: directories that no loss may read (the server's data), wherever they lie.
    """
    private = [os.path.realpath(path) for path in hidden]
    imports, files, names = [], [], []
    for root in _roots():
        if not os.path.isdir(root):
            continue
        imports.append(root)
        if _is_library(root) and not any(_within(path, root) for path in private):
            files.append(root)
        else:
            names.append(root)
            files += _entries(root, private)
    base = Path(sys.base_prefix)
    files += [str(path) for path in (base / "lib", base / "lib64") if path.is_dir()]
    files += [path for path in (*LIBRARIES, LOADER_CACHE) if os.path.exists(path)]
    return Readable(tuple(imports), tuple(dict.fromkeys(files)), tuple(names))


def _roots() -> Iterator[str]:
    """sys.path, but for the entry of the current directory that `python -m` puts first."""
    asked = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    here = os.path.realpath(os.getcwd())
    editable = {os.path.realpath(line) for line in _listed_in_pth()}
    for path in dict.fromkeys(sys.path):
        if not path or path.endswith(".zip"):
            continue
        real = os.path.realpath(path)
        if real == here and path not in asked and real not in editable:
            continue
        yield os.path.abspath(path)


def _listed_in_pth() -> Iterator[str]:
    for folder in sys.path:
        if not _is_library(folder) or not os.path.isdir(folder):
            continue
        for pth in Path(folder).glob("*.pth"):
            yield from (line.strip() for line in pth.read_text().splitlines() if line.strip().startswith("/"))


def _is_library(path: str) -> bool:
    """Whether a directory holds nothing but what was installed."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return Path(path).name in ("site-packages", "dist-packages", "lib-dynload") or path in standard


def _entries(root: str, private: list[str]) -> Iterator[str]:
    for entry in os.scandir(root):
        real = os.path.realpath(entry.path)
        if not entry.name.startswith(".") and not any(_within(path, real) or _within(real, path) for path in private):
            yield entry.path


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
