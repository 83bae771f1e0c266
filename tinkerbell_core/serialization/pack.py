"""Serializes a function as source text and values. A value that has neither form is an error that names it."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any, cast

import msgspec

from tinkerbell_core.captures import captured, is_installed
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
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.tensors import from_numpy, from_torch
from tinkerbell_core.types import TensorData

_INT_LIMIT = 1 << 63  # msgpack integers have 64 bits


def pack(fn: Callable[..., Any]) -> bytes:
    """The function, its helpers and captured values in msgpack. Raises BadUpload that names an unsupported value."""
    root = fn.fn if isinstance(fn, LossSpec) else fn
    if not isinstance(root, types.FunctionType):
        raise BadUpload(f"a {type(root).__name__} has no source text: make the loss a function")
    packing = _Packing(root)
    packing.helper(root)
    return msgspec.msgpack.encode(SerializedLoss(cast("list[Function]", packing.functions)))


class _Packing:
    """Walks over a function and its helpers."""

    def __init__(self, root: types.FunctionType) -> None:
        self._root = root
        self._numbers: dict[int, int] = {}
        self._seen: dict[int, object] = {}  # id → object; a kept object's id is not reused
        self.functions: list[Function | None] = []

    def helper(self, fn: types.FunctionType) -> HelperRef:
        number = self._numbers.get(id(fn))
        if number is None:
            number = self._numbers[id(fn)] = len(self.functions)
            self.functions.append(None)  # reserves the index, which a recursive function refers to
            self.functions[number] = self._function(fn)
        return HelperRef(number)

    def _function(self, fn: types.FunctionType) -> Function:
        text, first_line = _text_of(fn)
        scope = {
            # a recursive loss: in a notebook, its name still holds the loss of the cell's previous run
            name: HelperRef(0) if name == self._root.__name__ else self.value(name, value)
            for name, value in captured(fn).items()
        }
        return Function(
            name=fn.__name__,
            text=text,
            filename=fn.__code__.co_filename,
            first_line=first_line,
            scope=scope,
            defaults=[self.value(f"a default of {fn.__name__}", value) for value in fn.__defaults__ or ()],
            keywords={name: self.value(name, value) for name, value in (fn.__kwdefaults__ or {}).items()},
            annotations={name: _annotation_text(annotation) for name, annotation in fn.__annotations__.items()},
        )

    def value(self, name: str, value: object) -> Value:
        """Serialize `value`, which the function reads as `name`."""
        value = value.fn if isinstance(value, LossSpec) else value
        match value:
            case None | bool() | float() | str() if type(value) in (type(None), bool, float, str):
                return Scalar(value)
            case bytes() if type(value) is bytes:
                return Bytes(value)
            case int() if type(value) is int and -_INT_LIMIT <= value < _INT_LIMIT:
                return Scalar(value)
            case types.ModuleType() if is_installed(value.__name__):
                return Imported(value.__name__, "")
            case types.FunctionType() if not is_installed(value.__module__):
                return self.helper(value)
            case list() | tuple() | set() | frozenset() if type(value) in (list, tuple, set, frozenset):
                self._check_once(name, value)
                items = [self.value(name, item) for item in value]
                return Collection(type(value).__name__, items)  # type: ignore[arg-type]
            case dict() if type(value) is dict:
                self._check_once(name, value)
                return Dictionary([(self.value(name, key), self.value(name, item)) for key, item in value.items()])
        packed = _array(value) or _imported(value)
        if packed is None:
            raise BadUpload(_refusal(name, value))
        if isinstance(packed, Array):
            self._check_once(name, value)
        return packed

    def _check_once(self, name: str, value: object) -> None:
        if id(value) in self._seen and not isinstance(value, tuple | frozenset):
            raise BadUpload(f"{name!r} is captured twice, and shared objects cannot be sent as source")
        self._seen[id(value)] = value


def _text_of(fn: types.FunctionType) -> tuple[str, int]:
    """The source text of a function without its decorators, and its first line."""
    try:
        lines, start = inspect.getsourcelines(fn.__code__)
        text = textwrap.dedent("".join(lines))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError, IndexError):
        raise BadUpload(f"the source text of {fn.__name__!r} is not available") from None
    first = tree.body[0] if tree.body else None
    if isinstance(first, ast.FunctionDef) and first.name == fn.__name__:
        own = text.splitlines()[first.lineno - 1 : first.end_lineno]
        return "\n".join(own) + "\n", max(start, 1) + first.lineno - 1
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    segment = ast.get_source_segment(text, lambdas[0]) if len(lambdas) == 1 else None
    if segment is None or fn.__name__ != "<lambda>":
        raise BadUpload(f"the source text of {fn.__name__!r} cannot be separated from the code around it")
    return segment, max(start, 1) + lambdas[0].lineno - 1


def _array(value: Any) -> Array | None:  # Any: a tensor, an array or anything else
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and type(value) is torch.Tensor and not value.requires_grad:
        return _array_of(from_torch(value), numpy=False)
    if numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "bifu":
        return _array_of(from_numpy(value), numpy=True)
    return None


def _array_of(tensor: TensorData, *, numpy: bool) -> Array:
    return Array(tensor.data, tensor.dtype, tensor.shape, numpy)


def _imported(value: Any) -> Imported | None:  # Any: any object
    """The module and name of an object of an installed module; None if the object is not found under its name."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        return Imported("torch", str(value).removeprefix("torch."))
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None and isinstance(value, types.BuiltinFunctionType):
        owner = getattr(value, "__self__", None)
        module = owner.__name__ if isinstance(owner, types.ModuleType) else None
        if module is None and torch is not None and getattr(torch, value.__name__, None) is value:
            module = "torch"  # the __module__ of torch's functions is None
    if not isinstance(module, str) or not isinstance(name, str) or not is_installed(module):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value and torch is not None and getattr(torch, name, None) is value:
        return Imported("torch", name)
    return Imported(module, name) if found is value else None


def _annotation_text(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))


def _refusal(name: str, value: object) -> str:
    if isinstance(value, types.ModuleType):
        return (
            f"{name!r} is the local module {value.__name__!r}: import the functions that the loss needs from it, "
            "or upload the loss with via='cloudpickle'"
        )
    return (
        f"{name!r} is a {type(value).__qualname__}, which cannot be sent as source: create it inside the loss, pass it "
        "as numbers through loss_fn_inputs, or upload the loss with via='cloudpickle'"
    )
