"""Rebuilds a function from a serialized loss. This executes only its `def`, and imports only installed modules."""

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
    Bytes,
    Collection,
    Dictionary,
    Function,
    HelperRef,
    Imported,
    Scalar,
    SerializedLoss,
    Value,
)
from tinkerbell_core.tensors import to_numpy, to_torch
from tinkerbell_core.types import TensorData

_MODULE = "uploaded"  # __name__ of a rebuilt function's globals
_DEPTH_LIMIT = 64  # of nested values


def unpack(payload: bytes) -> Callable[..., Any]:
    """The function in `payload`, with its source lines available to tracebacks. Raises BadUpload if it is malformed."""
    try:
        serialized = msgspec.msgpack.decode(payload, type=SerializedLoss)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadUpload(f"the payload is not a loss as source: {str(error)[:200]}") from None
    if not serialized.functions:
        raise BadUpload("the payload is not a loss as source: it has no function")
    return _Unpacking(serialized).functions[0]


class _Unpacking:
    """Creates all functions of a payload, then sets the values that they read."""

    def __init__(self, serialized: SerializedLoss) -> None:
        self.functions = [_define(function) for function in serialized.functions]
        for function, defined in zip(serialized.functions, self.functions, strict=True):
            defined.__globals__.update({name: self.value(value) for name, value in function.scope.items()})
            defined.__defaults__ = tuple(self.value(value) for value in function.defaults) or None
            defined.__kwdefaults__ = {name: self.value(value) for name, value in function.keywords.items()} or None
            defined.__annotations__ = dict(function.annotations)

    def value(self, value: Value, depth: int = 0) -> Any:  # Any: any captured value
        if depth > _DEPTH_LIMIT:
            raise BadUpload("a captured value is nested too deeply")
        match value:
            case Scalar() | Bytes():
                return value.value
            case Collection():
                kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
                return kinds[value.kind](self.value(item, depth + 1) for item in value.items)
            case Dictionary():
                return {self.value(key, depth + 1): self.value(item, depth + 1) for key, item in value.pairs}
            case Array():
                return _array(value)
            case Imported():
                return _import(value)
            case HelperRef():
                if not 0 <= value.number < len(self.functions):
                    raise BadUpload(f"the payload has no function {value.number}")
                return self.functions[value.number]


def _define(function: Function) -> types.FunctionType:
    """The function with an empty scope and placeholders for its defaults, whose expressions are not evaluated."""
    is_lambda = function.name == "<lambda>"
    text = f"_ = {function.text}" if is_lambda else function.text
    try:
        tree = ast.parse(text, function.filename)
        first = tree.body[0] if tree.body else None
        node = first.value if is_lambda and isinstance(first, ast.Assign) else first
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            raise BadUpload(f"the source text of {function.name!r} is not a function")
        _strip(node)
        ast.increment_lineno(tree, max(1, function.first_line) - 1)
        flags = __future__.annotations.compiler_flag
        code = compile(tree, function.filename, "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadUpload(f"the source text of {function.name!r} does not compile: {error}") from None
    _show(function)
    scope: dict[str, Any] = {"__name__": _MODULE, "__builtins__": __builtins__}
    exec(code, scope)
    defined = scope.pop("_" if is_lambda else function.name, None)
    if not isinstance(defined, types.FunctionType):
        raise BadUpload(f"the source text of {function.name!r} defines another name")
    return defined


def _strip(node: ast.FunctionDef | ast.Lambda) -> None:
    """Remove the expressions that `def` would evaluate: decorators, defaults and annotations."""
    arguments = node.args
    arguments.defaults = [ast.copy_location(ast.Constant(None), default) for default in arguments.defaults]
    arguments.kw_defaults = [
        None if default is None else ast.copy_location(ast.Constant(None), default) for default in arguments.kw_defaults
    ]
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in parameters:
        if argument is not None:
            argument.annotation = None
    if isinstance(node, ast.FunctionDef):
        node.returns, node.decorator_list = None, []


def _show(function: Function) -> None:
    """Add the author's lines to linecache, which tracebacks read, unless the file on this machine has them."""
    lines = linecache.getlines(function.filename)[:]
    own = [f"{line}\n" for line in function.text.splitlines()]
    first = min(max(1, function.first_line), 1_000_000)
    existing = lines[first - 1 : first - 1 + len(own)]
    if len(existing) == len(own) and all(mine.strip() in line for mine, line in zip(own, existing, strict=True)):
        return
    lines += ["\n"] * (first - 1 + len(own) - len(lines))
    lines[first - 1 : first - 1 + len(own)] = own
    # with a modification time of None, linecache does not look for the file on this machine
    linecache.cache[function.filename] = (sum(map(len, lines)), None, lines, function.filename)


def _array(array: Array) -> Any:  # Any: a tensor or a numpy array
    tensor = TensorData(array.data, array.dtype, array.shape)
    return to_numpy(tensor).copy() if array.numpy else to_torch(tensor)


def _import(imported: Imported) -> Any:  # Any: any object
    try:
        found: Any = importlib.import_module(imported.module)
        for part in imported.name.split(".") if imported.name else ():
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        what = f"{imported.module}.{imported.name}".rstrip(".")
        raise BadUpload(f"the loss uses {what}, which is not installed here ({error})") from None
    return found
