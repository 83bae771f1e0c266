"""`tinkerbell doctor`: looks for what would stop a server here, and says what to do about each."""

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
from tinkerbell_server.cli.serve import NEEDED, default_data_dir


class Check(msgspec.Struct, frozen=True):
    """One thing looked at: whether a server can do with it, and what was found."""

    name: str
    ok: bool
    found: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Look for what would stop a server on this machine; exit 1 where something would."""
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
    yield Check("python", (3, 11) <= sys.version_info[:2] <= (3, 13), platform.python_version())
    yield from map(package, NEEDED)
    yield device()
    yield data_dir()
    yield from sandbox()
    yield from broken_plugins()


def package(name: str) -> Check:
    try:
        return Check(name, True, version_of(name))
    except PackageNotFoundError:
        return Check(name, False, "not installed: pip install 'tinkerbell-core[server]'")


def device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", False, str(error))
    if not torch.cuda.is_available():
        return Check("device", True, f"cpu, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("device", True, "cuda: " + ", ".join(names))


def data_dir() -> Check:
    """Whether the nearest folder that exists on the way to the default data dir can be written."""
    path = default_data_dir()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = os.access(nearest, os.W_OK)
    return Check("data dir", writable, str(path) if writable else f"{nearest} cannot be written: pass --data-dir")


def sandbox() -> Iterator[Check]:
    """What can confine uploaded losses here. One that is missing is no harm while the others are enough."""
    from tinkerbell_server.sandbox.isolation.mechanisms import enough, examine
    from tinkerbell_server.sandbox.isolation.readable_paths import readable

    found = examine(readable([str(default_data_dir())]))
    sufficient = enough(found)
    for each in found:
        yield Check(each.name, each.works or sufficient, each.found)
    works = ", ".join(each.name for each in found if each.works)
    missing = "not possible on this machine: `serve` starts with uploads off"
    yield Check("sandboxed uploads", sufficient, f"by {works}" if sufficient else missing)


def broken_plugins() -> Iterator[Check]:
    from tinkerbell_core.registry import build_registry

    _, infos = build_registry()
    for info in infos:
        if info.error:
            yield Check(info.id, False, info.error)
    yield Check("plugins", True, f"{sum(not info.error for info in infos)} load")
