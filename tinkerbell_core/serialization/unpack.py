"""Makes a function of baggage. Runs nothing of it but `def`; importing what it names runs installed code only."""

from __future__ import annotations
import __future__

import ast
import importlib
import linecache
import types
from collections.abc import Callable
from typing import Any

import msgspec

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.serialization.format import (
    Array,
    Function,
    Helper,
    Mapped,
    Named,
    Plain,
    Raw,
    SerializedLoss,
    Several,
    Value,
)
from tinkerbell_core.tensors import to_numpy, to_torch
from tinkerbell_core.types import TensorData

_MODULE = "uploaded"
_DEPTH = 64


def unpack(payload: bytes) -> Callable[..., Any]:
    """The function in `payload`, its lines where tracebacks look for them. Raises BadUpload for one that is none."""
    try:
        baggage = msgspec.msgpack.decode(payload, type=SerializedLoss)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadUpload(f"this is no loss as source: {str(error)[:200]}") from None
    if not baggage.functions:
        raise BadUpload("this is no loss as source: it holds no function")
    rebuilding = _Rebuilding(baggage)
    return rebuilding.functions[0]


class _Rebuilding:
    def __init__(self, baggage: SerializedLoss) -> None:
        self.functions = [_defined(function) for function in baggage.functions]
        for function, made in zip(baggage.functions, self.functions, strict=True):
            made.__globals__.update({name: self.value(value) for name, value in function.scope.items()})
            made.__defaults__ = tuple(self.value(value) for value in function.defaults) or None
            made.__kwdefaults__ = {name: self.value(value) for name, value in function.keywords.items()} or None
            made.__annotations__ = dict(function.annotations)

    def value(self, value: Value, depth: int = 0) -> Any:  # Any: whatever was captured
        if depth > _DEPTH:
            raise BadUpload("a captured value is nested too deeply")
        match value:
            case Plain() | Raw():
                return value.value
            case Several():
                kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
                return kinds[value.kind](self.value(item, depth + 1) for item in value.items)
            case Mapped():
                return {self.value(key, depth + 1): self.value(item, depth + 1) for key, item in value.pairs}
            case Array():
                return _array(value)
            case Named():
                return _named(value)
            case Helper():
                if not 0 <= value.number < len(self.functions):
                    raise BadUpload(f"there is no function number {value.number}")
                return self.functions[value.number]


def _defined(function: Function) -> types.FunctionType:
    """The function with an empty scope and placeholders for defaults: their expressions belong to another place."""
    is_lambda = function.name == "<lambda>"
    # any name will do for a lambda: it is not looked up again
    text = f"_ = {function.text}" if is_lambda else function.text
    try:
        tree = ast.parse(text, function.filename)
        first = tree.body[0] if tree.body else None
        node = first.value if is_lambda and isinstance(first, ast.Assign) else first
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            raise BadUpload(f"the text of {function.name!r} is not a function's")
        _strip(node)
        ast.increment_lineno(tree, max(1, function.first_line) - 1)
        flags = __future__.annotations.compiler_flag
        code = compile(tree, function.filename, "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadUpload(f"the text of {function.name!r} does not compile here: {error}") from None
    _show(function)
    scope: dict[str, Any] = {"__name__": _MODULE, "__builtins__": __builtins__}
    exec(code, scope)
    made = scope.pop("_" if is_lambda else function.name, None)
    if not isinstance(made, types.FunctionType):
        raise BadUpload(f"the text of {function.name!r} is not its function's")
    return made


def _strip(node: ast.FunctionDef | ast.Lambda) -> None:
    """Take out what `def` would evaluate: decorators, defaults, annotations."""
    arguments = node.args
    arguments.defaults = [ast.copy_location(ast.Constant(None), default) for default in arguments.defaults]
    arguments.kw_defaults = [
        None if default is None else ast.copy_location(ast.Constant(None), default) for default in arguments.kw_defaults
    ]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    if isinstance(node, ast.FunctionDef):
        node.returns, node.decorator_list = None, []


def _show(function: Function) -> None:
    """Lay the author's lines where tracebacks look for them, unless they are there: at the author's own they are."""
    lines = linecache.getlines(function.filename)[:]
    own = [f"{line}\n" for line in function.text.splitlines()]
    first = min(max(1, function.first_line), 1_000_000)
    there = lines[first - 1 : first - 1 + len(own)]
    if len(there) == len(own) and all(mine.strip() in line for mine, line in zip(own, there, strict=True)):
        return
    lines += ["\n"] * (first - 1 + len(own) - len(lines))
    lines[first - 1 : first - 1 + len(own)] = own
    # a modification time of None: not looked for on this machine's disk
    linecache.cache[function.filename] = (sum(map(len, lines)), None, lines, function.filename)


def _array(array: Array) -> Any:  # Any: a tensor or a numpy array
    tensor = TensorData(array.data, array.dtype, array.shape)
    return to_numpy(tensor).copy() if array.numpy else to_torch(tensor)


def _named(named: Named) -> Any:  # Any: whatever has that name
    try:
        found: Any = importlib.import_module(named.module)
        for part in named.name.split(".") if named.name else ():
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        what = f"{named.module}.{named.name}".rstrip(".")
        raise BadUpload(f"the loss uses {what}, which is not installed here ({error})") from None
    return found
