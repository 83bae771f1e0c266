"""Computes the digest of a loss, and finds its source text. Imports no torch and does not run the loss."""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

from tinkerbell_core.captures import captured, is_installed
from tinkerbell_core.spec import LossSpec

_Fn = Callable[..., Any]  # Any: each loss has its own signature


def source_of(fn: _Fn) -> str:
    """The source text of `fn` without its decorators; an empty string if there is none."""
    function = inspect.unwrap(_without_spec(fn))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return _text(code) if code is not None else ""


def digest_of(fn: _Fn, *, coupling: str, group_size: int, preferred_rows: tuple[int, ...] = ()) -> str:
    """sha256 (hex) of what defines the loss: its source, and the values of its defaults and captured variables.

    Helper functions are included in the same way. Installed objects are included by name only, except functions of
    the loss's own package. The name and the line of a notebook cell are not included.
    """
    root = _without_spec(fn)
    digest = _Digest(root)
    digest.write("loss", coupling, str(group_size), *(f"preferred {row}" for row in preferred_rows))
    digest.value(root)
    return digest.hexdigest()


class _Digest:
    """Walks over values and writes each of them into a hash once."""

    def __init__(self, root: object) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, object]] = {}  # id → order, object; a kept object's id is not reused
        self._root = root
        self._package = str(getattr(root, "__module__", "")).partition(".")[0]

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def write(self, *words: str | bytes) -> None:
        for word in words:
            data = word.encode() if isinstance(word, str) else word
            self._hash.update(f"{len(data)}:".encode() + data)

    def value(self, value: object) -> None:
        value = _without_spec(value)
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            self.write(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self.write("again", str(self._seen[id(value)][0]))
            return
        self._seen[id(value)] = (len(self._seen), value)
        self._compound(value)

    def _compound(self, value: object) -> None:
        match value:
            case types.FunctionType():
                self._function(value)
            case types.ModuleType():
                self._module(value)
            case types.CodeType():
                self._code(value)
            case types.MethodType():
                self._parts("method", value.__func__, value.__self__)
            case functools.partial():
                self._parts("partial", value.func, value.args, value.keywords)
            case type():
                self._class(value)
            case enum.Enum():
                self.write("enum", _qualified(type(value)), value.name)
            case list() | tuple():
                self._parts(type(value).__name__, *value)
            case dict():
                self._parts("dict", *(part for item in value.items() for part in item))
            case set() | frozenset():
                self.write("set", *sorted(repr(item) for item in value))
            case _:
                self._object(value)

    def _parts(self, kind: str, *parts: object) -> None:
        self.write(kind, str(len(parts)))
        for part in parts:
            self.value(part)

    def _function(self, fn: types.FunctionType) -> None:
        own = fn is self._root or fn.__module__.partition(".")[0] == self._package
        if is_installed(fn.__module__) and not own:
            self.write("function", _qualified(fn))
            return
        text = _text(fn.__code__)
        self.write("function", text)
        if not text:
            self.value(fn.__code__)
        self._parts("defaults", fn.__defaults__, fn.__kwdefaults__)
        for name, value in sorted(captured(fn).items()):
            self.write(name)
            # A recursive loss: in a notebook, its name still holds the loss of the cell's previous run.
            self.value("itself" if name == getattr(self._root, "__name__", None) else value)

    def _module(self, module: types.ModuleType) -> None:
        self.write("module", module.__name__)
        path = getattr(module, "__file__", None)
        if path and path.endswith(".py") and not is_installed(module.__name__):
            self.write(_read(path))

    def _code(self, code: types.CodeType) -> None:
        self.write("code", code.co_code, *code.co_names, *code.co_varnames)
        self._parts("constants", *code.co_consts)

    def _class(self, cls: type) -> None:
        self.write("class", cls.__qualname__)
        if is_installed(cls.__module__):
            self.write(cls.__module__)
            return
        members = {name: getattr(member, "__func__", member) for name, member in vars(cls).items()}
        for name, member in sorted(members.items()):
            if isinstance(member, types.FunctionType):
                if _text(member.__code__):
                    self.write(name)
                    self.value(member)
            elif not name.startswith("__"):
                self.write(name)
                self.value(member)
        self._parts("bases", *cls.__bases__)

    def _object(self, value: object) -> None:
        cls = type(value)
        if (array := _array(value)) is not None:
            self.write("array", *array)
        elif (state := _state(value)) is not None:
            self._parts("module state", _qualified(cls), state)
        elif isinstance(value, types.BuiltinFunctionType):
            self.write("function", _qualified(value))
        elif is_installed(cls.__module__):
            self.write("object", _qualified(cls), re.sub(r"0x[0-9a-fA-F]+", "", repr(value)))
        else:
            slots = {n: getattr(value, n) for n in getattr(cls, "__slots__", ()) if hasattr(value, n)}
            self._parts("object", cls, {**slots, **getattr(value, "__dict__", {})})


def _without_spec(value: Any) -> Any:  # Any: any value; a LossSpec becomes its function
    return value.fn if isinstance(value, LossSpec) else value


def _text(code: types.CodeType) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(code))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    first = tree.body[0] if tree.body else None
    if isinstance(first, ast.FunctionDef | ast.AsyncFunctionDef):
        return "\n".join(text.splitlines()[first.lineno - 1 : first.end_lineno]) + "\n"
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return (ast.get_source_segment(text, lambdas[0]) or "") if len(lambdas) == 1 else ""


def _qualified(value: Any) -> str:  # Any: a function, a class or a builtin
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', value.__class__.__qualname__)}"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _array(value: object) -> tuple[str, str, bytes] | None:
    """dtype, shape and bytes of a tensor or a numpy array; None for anything else."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        from tinkerbell_core.tensors import from_torch  # imports numpy, which `import tinkerbell_core` does not need

        return str(value.dtype), str(tuple(value.shape)), from_torch(value).data
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return str(value.dtype), str(value.shape), value.tobytes()
    return None


def _state(value: object) -> dict[str, object] | None:
    """The weights and buffers of a captured torch module; None for anything else."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "nn") and isinstance(value, torch.nn.Module):
        return {"repr": repr(value), **value.state_dict()}
    return None
