"""Finds the files that an uploaded loss may read: the code that it may import, and the libraries of the system."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib")
PROCESSORS = "/sys/devices/system/cpu"
LOADER_CACHE = "/etc/ld.so.cache"

_REMEDY = "set the data dir (--data-dir) to a folder outside it"


@dataclass(frozen=True, slots=True)
class ReadablePaths:
    """The paths that a loss may read, and why some are left out.

    imports: the sys.path of the sandbox. files: files and directories that may be read with everything in them; none
    of them contains a hidden directory, unless `exposed` names it. partial: directories of which only the entries in
    `files` may be read. unlistable: those of `partial` that contain a hidden directory. Landlock must not allow to list
    them: it would allow to list everything below them, too. warnings: sentences about directories on the import path
    that losses can read only in part. exposed: why a hidden directory cannot be hidden, or an empty string.
    """

    imports: tuple[str, ...]
    files: tuple[str, ...]
    partial: tuple[str, ...]
    unlistable: tuple[str, ...]
    warnings: tuple[str, ...]
    exposed: str


def find_readable_paths(hidden: Iterable[str] = ()) -> ReadablePaths:
    """The directories of sys.path, with editable installs, but without the current directory and without dot files.

    hidden: directories that no loss may read, such as the server's data dir, wherever they are.
    """
    real_hidden = [os.path.realpath(path) for path in hidden]
    imports: list[str] = []
    files: list[str] = []
    partial: list[str] = []
    for root in _import_roots():
        if not os.path.isdir(root):
            continue
        imports.append(root)
        if _is_library(root) and not _below(root, real_hidden):
            files.append(root)
            continue
        for directory, entries in _readable_entries(root, real_hidden):
            partial.append(directory)
            files += entries
    libraries = _libraries()
    return ReadablePaths(
        imports=tuple(imports),
        files=tuple(dict.fromkeys([*files, *libraries])),
        partial=tuple(partial),
        unlistable=tuple(directory for directory in partial if _below(directory, real_hidden)),
        warnings=tuple(_warnings(imports, real_hidden)),
        exposed=_exposed(libraries, real_hidden),
    )


def _libraries() -> list[str]:
    base = Path(sys.base_prefix)
    directories = [str(path) for path in (base / "lib", base / "lib64") if path.is_dir()]
    return [*directories, *(path for path in (*LIBRARIES, LOADER_CACHE) if os.path.exists(path))]


def _import_roots() -> Iterator[str]:
    """The entries of sys.path, except the current directory, which `python -m` puts first."""
    explicit = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    current = os.path.realpath(os.getcwd())
    editable = {os.path.realpath(line) for line in _listed_in_pth()}
    for path in dict.fromkeys(sys.path):
        if not path or path.endswith(".zip"):
            continue
        real = os.path.realpath(path)
        if real == current and path not in explicit and real not in editable:
            continue
        yield os.path.abspath(path)


def _listed_in_pth() -> Iterator[str]:
    for folder in sys.path:
        if not _is_library(folder) or not os.path.isdir(folder):
            continue
        for pth in Path(folder).glob("*.pth"):
            yield from (line.strip() for line in pth.read_text().splitlines() if line.strip().startswith("/"))


def _is_library(path: str) -> bool:
    """Whether a directory holds only installed code."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return Path(path).name in ("site-packages", "dist-packages", "lib-dynload") or path in standard


def _readable_entries(directory: str, hidden: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The directory and those below it that contain a hidden one, each with its entries that may be read completely."""
    entries, mixed = [], []
    for entry in os.scandir(directory):
        real = os.path.realpath(entry.path)
        if entry.name.startswith(".") or any(_is_within(real, path) for path in hidden):
            continue
        if not _below(real, hidden):
            entries.append(entry.path)
        elif entry.is_dir(follow_symlinks=False):  # a link could lead back to this directory
            mixed.append(entry.path)
    yield directory, entries
    for path in mixed:
        yield from _readable_entries(path, hidden)


def _warnings(imports: Iterable[str], hidden: Sequence[str]) -> Iterator[str]:
    for root in imports:
        for path in _below(root, hidden):
            yield (
                f"{root} is on the import path (sys.path) and contains {path}, which uploaded losses must not read. "
                "They can import the other modules in it, but without bubblewrap only those that exist when the "
                f"sandbox starts: {_REMEDY}, or remove it from PYTHONPATH"
            )
        for path in hidden:
            if _is_within(os.path.realpath(root), path) and not _is_library(root):
                yield (
                    f"{root} is on the import path (sys.path), but lies in {path}, which uploaded losses must not "
                    "read, so they cannot import from it: set the data dir (--data-dir) to a folder that does not "
                    "contain it"
                )


def _exposed(libraries: Iterable[str], hidden: Sequence[str]) -> str:
    for library in libraries:
        for path in _below(library, hidden):
            return (
                f"{path} must be hidden from uploaded losses, but lies in {library}, which they must be able to read "
                f"because it holds system libraries: {_REMEDY}"
            )
    return ""


def _below(directory: str, paths: Sequence[str]) -> list[str]:
    """Those of the real paths that are the directory or lie below it."""
    real = os.path.realpath(directory)
    return [path for path in paths if _is_within(path, real)]


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
