"""What a function reads from outside itself: its captured variables, and whether a module is installed."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator


def captured(fn: types.FunctionType) -> dict[str, object]:
    """Globals and closure variables that `fn` reads, by name, without builtins and names that are not bound yet."""
    found = {name: fn.__globals__[name] for name in _global_names(fn.__code__) if name in fn.__globals__}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # an empty cell: not bound yet
            continue
    return found


def is_installed(module: str | None) -> bool:
    """Whether a module comes with Python, a distribution or Tinkerbell, so that its name identifies its content."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == "tinkerbell_core":
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
