"""The arguments of a graph's operations: read from plain data, and checked against what an operation takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from tinkerbell_core.fxgraph.operations import ATTRIBUTES, DTYPES, WORDS, Parameter

_ITEMS = 64  # of all arguments of one operation, nested ones too
_DEPTH = 6
_TEXT = 64
_WIDE = 1 << 53  # integers are exact below it in whatever wrote the JSON


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of the node of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class Slice:
    start: Ref | int | None
    stop: Ref | int | None
    step: Ref | int | None


Scalar = bool | int | float | str | None
Value = Scalar | EllipsisType | Ref | Dtype | Slice | list[Any] | tuple[Any, ...]  # Any: Values


class Reader:
    """Reads one node's arguments. Raises ValueError for what is none; `refers`: whether a node was among them."""

    def __init__(self, known: set[str], items: int = _ITEMS) -> None:
        self._known, self._left = known, items
        self.refers = False

    def value(self, raw: Any, depth: int = 0) -> Value:  # Any: what JSON gives
        """One argument."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise ValueError("it has too many arguments, or too deeply nested ones")
        match raw:
            case None | bool() | float():
                return raw
            case int():
                if abs(raw) > _WIDE:
                    raise ValueError("it holds an integer that is too large")
                return raw
            case str():
                if len(raw) > _TEXT:
                    raise ValueError("it holds a text that is too long")
                return raw
            case list():
                return [self.value(item, depth + 1) for item in raw]
            case dict() if len(raw) == 1:
                ((kind, content),) = raw.items()
                return self._wrapped(kind, content, depth)
        raise ValueError("it holds an argument of no known form")

    def output(self, raw: Any) -> tuple[str, dict[str, str]]:  # Any: as above
        """(loss, metrics) as names of nodes."""
        pair = raw.get("tuple") if isinstance(raw, dict) and len(raw) == 1 else raw
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("it must be two things")
        loss, metrics = pair
        if not isinstance(metrics, dict) or metrics.keys() != {"dict"} or not isinstance(metrics["dict"], dict):
            raise ValueError("its metrics must be a dict")
        return self._node(loss), {key: self._node(value) for key, value in metrics["dict"].items()}

    def _node(self, raw: Any) -> str:  # Any: as above
        found = self.value(raw)
        if not isinstance(found, Ref):
            raise ValueError("the loss and each metric must be a node, not a constant")
        return found.name

    def _wrapped(self, kind: str, content: Any, depth: int) -> Value:  # Any: as above
        match kind, content:
            case "ref", str():
                if content not in self._known:
                    raise ValueError(f"it refers to {content[:80]!r}, which is no node before it")
                self.refers = True
                return Ref(content)
            case "tuple", list():
                return tuple(self.value(item, depth + 1) for item in content)
            case "slice", [_, _, _]:
                bounds = [self.value(item, depth + 1) for item in content]
                if not all(bound is None or _is_int(bound) for bound in bounds):
                    raise ValueError("a slice has integers")
                return Slice(*bounds)  # type: ignore[arg-type]  # checked the line before
            case "ellipsis", True:
                return ...
            case "float", "inf" | "-inf" | "nan":
                return float(content)
            case "dtype", str() if content in DTYPES:
                return Dtype(content)
        raise ValueError(f"it holds a {kind[:40]!r} that a graph may not have")


def check_arguments(
    parameters: Sequence[Parameter], args: Sequence[Value], kwargs: dict[str, Value], is_method: bool
) -> None:
    """Raise ValueError for arguments that are not what the operation takes."""
    if is_method and not (args and isinstance(args[0], Ref)):
        raise ValueError("a method is called on a node")
    given: set[str] = set()
    left = list(args)
    for parameter in parameters:
        if not left:
            break
        taken = left if parameter.many else left[:1]
        left = left[len(taken) :]
        given.add(parameter.name)
        for value in taken:
            _check(parameter, value)
    if left:
        raise ValueError(f"it takes {len(parameters)} arguments at most, not {len(args)}")
    known = {parameter.name: parameter for parameter in parameters}
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"it has no argument {name[:40]!r} in a graph")
        if name in given:
            raise ValueError(f"it is given {name!r} twice")
        given.add(name)
        _check(known[name], value)
    missing = [parameter.name for parameter in parameters if parameter.required and parameter.name not in given]
    if missing:
        raise ValueError(f"it lacks the argument {missing[0]!r}")


def _check(parameter: Parameter, value: Value) -> None:
    if value is None and not parameter.required:
        return
    if not _fits(parameter, value):
        raise ValueError(f"its argument {parameter.name!r} is not what it may be in a graph")


def _fits(parameter: Parameter, value: Value) -> bool:
    match parameter.kind:
        case "operand":
            return isinstance(value, Ref | bool | int | float)
        case "node":
            return isinstance(value, Ref)
        case "nodes":
            return isinstance(value, list | tuple) and all(isinstance(item, Ref) for item in value)
        case "dims":
            return _is_int(value) or (isinstance(value, list | tuple) and all(_is_int(item) for item in value))
        case "flag":
            return isinstance(value, bool)
        case "number":
            return isinstance(value, Ref | int | float) or (parameter.name == "p" and value == "fro")
        case "dtype":
            return isinstance(value, Dtype | Ref)
        case "word":
            return isinstance(value, str) and value in WORDS
        case "index":
            parts = value if isinstance(value, tuple | list) else (value,)
            return all(part is None or part is ... or isinstance(part, Slice) or _is_index(part) for part in parts)
        case "attribute":
            return isinstance(value, str) and value in ATTRIBUTES
        case "unset":
            return value is False or (parameter.name == "device" and isinstance(value, Ref))


def _is_int(value: object) -> bool:
    return isinstance(value, Ref) or (isinstance(value, int) and not isinstance(value, bool))


def _is_index(value: object) -> bool:
    return _is_int(value) or (isinstance(value, list) and all(_is_int(item) for item in value))
