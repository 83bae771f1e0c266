"""`tinkerbell doctor`: checks whether a server can start on this machine, and names a remedy for each problem."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import click
import msgspec

from tinkerbell_server.cli.output import print_json, print_table
from tinkerbell_server.cli.serve import NEEDED
from tinkerbell_server.config import Settings


class Check(msgspec.Struct, frozen=True):
    """The result of one check. ok: a server can start; found: what the check found."""

    name: str
    ok: bool
    found: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check whether a server can start on this machine; the exit status is 1 if a check fails."""
    checks = list(examine())
    if as_json:
        print_json(checks)
    else:
        print_table(
            ["CHECK", "STATE", "FOUND"], [(each.name, "ok" if each.ok else "bad", each.found) for each in checks]
        )
    if not all(each.ok for each in checks):
        raise SystemExit(1)


def examine() -> Iterator[Check]:
    """Run all checks."""
    yield Check("python", sys.version_info >= (3, 11), platform.python_version())
    yield from map(package, NEEDED)
    yield device()
    yield data_dir()
    yield from sandbox()
    yield from broken_plugins()


def package(name: str) -> Check:
    """Whether a distribution is installed."""
    try:
        return Check(name, True, version_of(name))
    except PackageNotFoundError:
        return Check(name, False, "not installed: pip install 'tinkerbell-core[server]'")


def device() -> Check:
    """The device that `serve --device auto` uses."""
    try:
        import torch
    except ImportError as error:
        return Check("device", False, str(error))
    if not torch.cuda.is_available():
        return Check("device", True, f"cpu, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("device", True, "cuda: " + ", ".join(names))


def data_dir() -> Check:
    """Whether the default data dir can be created and written: checks its nearest parent that exists."""
    path = Settings().data_path
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = os.access(nearest, os.W_OK)
    return Check("data dir", writable, str(path) if writable else f"{nearest} cannot be written: pass --data-dir")


def sandbox() -> Iterator[Check]:
    """The mechanisms that can confine uploaded losses. A missing one is ok if the others are sufficient."""
    from tinkerbell_server.sandbox.isolation.mechanisms import detect, sufficient
    from tinkerbell_server.sandbox.isolation.readable_paths import find_readable_paths

    paths = find_readable_paths([str(Settings().data_path)])
    mechanisms = detect(paths)
    for each in mechanisms:
        yield Check(each.name, each.works or sufficient(mechanisms), each.found)
    works = ", ".join(each.name for each in mechanisms if each.works)
    problem = paths.exposed
    if not sufficient(mechanisms):
        problem = "not possible on this machine"
    yield Check(
        "sandboxed uploads", not problem, f"{problem}: `serve` starts with uploads off" if problem else f"by {works}"
    )


def broken_plugins() -> Iterator[Check]:
    """A check for each plugin that does not load, and one for the others together."""
    from tinkerbell_core.registry import build_registry

    _, infos = build_registry()
    for info in infos:
        if info.error:
            yield Check(info.id, False, info.error)
    yield Check("plugins", True, f"{sum(not info.error for info in infos)} load")
