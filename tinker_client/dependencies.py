"""What a loss takes along when it travels: its captured variables, and the modules that must go by value."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from tinkerbell_core.captures import captured, is_installed
from tinkerbell_core.spec import LossSpec

Fn = Callable[..., Any]  # Any: whatever a loss takes and gives


def captures(fn: Fn) -> Iterator[tuple[str, object]]:
    """Every global and closure variable that `fn` and its own helpers read, by the name they read it by."""
    seen: set[int] = set()
    waiting = [fn]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, types.FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in captured(current).items():
            yield name, value
            inner = value.fn if isinstance(value, LossSpec) else value
            if isinstance(inner, types.FunctionType) and not _stays(inner.__module__):
                waiting.append(inner)


def modules_by_value(fn: Fn) -> set[str]:
    """Names of the author's own modules that `fn` uses, which the server need not have."""
    named = [fn.__module__]
    for _, value in captures(fn):
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        named.append(name if isinstance(name, str) else type(value).__module__)
    return {name for name in named if name in sys.modules and not _stays(name)}


def _stays(module: str) -> bool:
    """Whether a module is the server's to import: installed, or pickled by value anyway."""
    top = module.partition(".")[0]
    return top in ("__main__", "tinker_client", "tinkerbell_server") or is_installed(module)
