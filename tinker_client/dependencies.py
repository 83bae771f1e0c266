"""Finds what a loss depends on: the variables that it captures, and modules that the server may not have."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from tinkerbell_core.captures import captured, is_installed
from tinkerbell_core.spec import LossSpec

Fn = Callable[..., Any]  # Any: each loss has its own signature


def captures(fn: Fn) -> Iterator[tuple[str, object]]:
    """(name, value) of every global and closure variable that `fn` and its helpers read."""
    seen: set[int] = set()
    queue = [fn]
    while queue:
        current = queue.pop()
        if not isinstance(current, types.FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in captured(current).items():
            yield name, value
            inner = value.fn if isinstance(value, LossSpec) else value
            if isinstance(inner, types.FunctionType) and not _on_server(inner.__module__):
                queue.append(inner)


def modules_by_value(fn: Fn) -> set[str]:
    """The names of local modules that `fn` uses. The server may not have them, so they are pickled by value."""
    names = [fn.__module__]
    for _, value in captures(fn):
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        names.append(name if isinstance(name, str) else type(value).__module__)
    return {name for name in names if name in sys.modules and not _on_server(name)}


def _on_server(module: str) -> bool:
    """Whether the server can import a module: it is installed, or cloudpickle sends it by value anyway."""
    top = module.partition(".")[0]
    return top in ("__main__", "tinker_client", "tinkerbell_server") or is_installed(module)
