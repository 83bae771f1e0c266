"""Parses the arguments of the operations of a graph from JSON, and checks them against the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from tinkerbell_core.fxgraph.operations import ATTRIBUTES, DTYPES, WORDS, Parameter

_MAX_ITEMS = 64  # of all arguments of one operation, nested ones included
_MAX_DEPTH = 6
_MAX_CHARACTERS = 64
_MAX_INT = 1 << 53  # larger integers are not exact in every JSON writer


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of the node with this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    """A torch dtype by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice, as an index."""

    start: Ref | int | None
    stop: Ref | int | None
    step: Ref | int | None


Scalar = bool | int | float | str | None
Value = Scalar | EllipsisType | Ref | Dtype | Slice | list[Any] | tuple[Any, ...]  # Any: Values


class Reader:
    """Parses the arguments of one node. Raises ValueError for an invalid one.

    known: names of earlier nodes. items: limit on the number of values. refers: whether an argument was a node.
    """

    def __init__(self, known: set[str], items: int = _MAX_ITEMS) -> None:
        self._known, self._remaining = known, items
        self.refers = False

    def value(self, raw: Any, depth: int = 0) -> Value:  # Any: decoded JSON
        """Parse one argument."""
        self._remaining -= 1
        if self._remaining < 0 or depth > _MAX_DEPTH:
            raise ValueError("there are too many arguments, or too deeply nested ones")
        match raw:
            case None | bool() | float():
                return raw
            case int():
                if abs(raw) > _MAX_INT:
                    raise ValueError("an integer is too large")
                return raw
            case str():
                if len(raw) > _MAX_CHARACTERS:
                    raise ValueError("a string is too long")
                return raw
            case list():
                return [self.value(item, depth + 1) for item in raw]
            case dict() if len(raw) == 1:
                ((kind, content),) = raw.items()
                return self._wrapped(kind, content, depth)
        raise ValueError("an argument has an unknown form")

    def output(self, raw: Any) -> tuple[str, dict[str, str]]:  # Any: as above
        """Parse the output (loss, metrics) as the names of nodes."""
        pair = raw.get("tuple") if isinstance(raw, dict) and len(raw) == 1 else raw
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("it must have two elements")
        loss, metrics = pair
        if not isinstance(metrics, dict) or metrics.keys() != {"dict"} or not isinstance(metrics["dict"], dict):
            raise ValueError("the metrics must be a dict")
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
                    raise ValueError(f"it refers to {content[:80]!r}, which is not an earlier node")
                self.refers = True
                return Ref(content)
            case "tuple", list():
                return tuple(self.value(item, depth + 1) for item in content)
            case "slice", [_, _, _]:
                bounds = [self.value(item, depth + 1) for item in content]
                if not all(bound is None or _is_int(bound) for bound in bounds):
                    raise ValueError("the bounds of a slice must be integers")
                return Slice(*bounds)  # type: ignore[arg-type]  # checked the line before
            case "ellipsis", True:
                return ...
            case "float", "inf" | "-inf" | "nan":
                return float(content)
            case "dtype", str() if content in DTYPES:
                return Dtype(content)
        raise ValueError(f"an argument has the kind {kind[:40]!r}, which a graph may not use")


def check_arguments(
    parameters: Sequence[Parameter], args: Sequence[Value], kwargs: dict[str, Value], is_method: bool
) -> None:
    """Raise ValueError for arguments that do not match the parameters of the operation."""
    if is_method and not (args and isinstance(args[0], Ref)):
        raise ValueError("the first argument of a method must be a node")
    given: set[str] = set()
    remaining = list(args)
    for parameter in parameters:
        if not remaining:
            break
        taken = remaining if parameter.many else remaining[:1]
        remaining = remaining[len(taken) :]
        given.add(parameter.name)
        for value in taken:
            _check(parameter, value)
    if remaining:
        raise ValueError(f"it takes at most {len(parameters)} arguments, not {len(args)}")
    known = {parameter.name: parameter for parameter in parameters}
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"in a graph it has no argument {name[:40]!r}")
        if name in given:
            raise ValueError(f"the argument {name!r} is passed twice")
        given.add(name)
        _check(known[name], value)
    missing = [parameter.name for parameter in parameters if parameter.required and parameter.name not in given]
    if missing:
        raise ValueError(f"the argument {missing[0]!r} is missing")


def _check(parameter: Parameter, value: Value) -> None:
    if value is None and not parameter.required:
        return
    if not _fits(parameter, value):
        raise ValueError(f"the argument {parameter.name!r} has a value that is not allowed in a graph")


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
