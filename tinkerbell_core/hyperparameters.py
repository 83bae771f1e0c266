"""The keyword arguments of a loss: types, ranges, and their values in one call. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinkerbell_core.errors import BadHyperparameter, BadLoss, did_you_mean


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from low to high. An open end is excluded; None means no limit. NaN is in no range."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        if value != value or value in (self.low if self.low_open else None, self.high if self.high_open else None):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'above' if self.low_open else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"{'below' if self.high_open else 'at most'} {self.high:g}"
        return f"{low} and {high}" if low and high else low or high or "any number"


def above(low: float) -> Range:
    """Numbers greater than `low`; for a divisor, above(0)."""
    return Range(low, low_open=True)


def at_least(low: float) -> Range:
    """Numbers not less than `low`; for a count, at_least(1)."""
    return Range(low)


SHARE = Range(0, 1)
"""A fraction, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A keyword argument of a loss.

    type: the annotation as text. required: it has no default. allowed: its range, None if the loss declares none.
    """

    name: str
    type: str
    default: bool | int | float | str | None = None
    required: bool = False
    allowed: Range | None = None

    def check(self, loss: str, value: object) -> None:
        """Raise BadHyperparameter for a value of the wrong type or outside the range."""
        if not _has_type(value, self.type):
            raise BadHyperparameter(f"loss {loss!r}: {self.name} is {value!r}, but must be {self.type}")
        if self.allowed is None or value is None or isinstance(value, str):
            return
        if not isinstance(value, int | float) or value not in self.allowed:
            raise BadHyperparameter(f"loss {loss!r}: {self.name} is {value!r}, but must be {self.allowed}")


def bind_hyperparameters(loss: str, known: tuple[Hyperparameter, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one call: the defaults of `known`, overridden by `config`. Raises BadHyperparameter."""
    by_name = {hyper.name: hyper for hyper in known}
    for name, value in config.items():
        if name not in by_name:
            takes = ", ".join(by_name) or "none"
            raise BadHyperparameter(
                f"loss {loss!r} has no hyperparameter {name!r}{did_you_mean(name, by_name)} (it takes: {takes})"
            )
        by_name[name].check(loss, value)
    missing = [hyper.name for hyper in known if hyper.required and hyper.name not in config]
    if missing:
        raise BadHyperparameter(f"loss {loss!r} needs {missing[0]!r}: pass loss_fn_config={{{missing[0]!r}: ...}}")
    return {hyper.name: config.get(hyper.name, hyper.default) for hyper in known}


def hyperparameters_of(
    fn: Callable[..., Any],  # Any: each loss has its own signature
    allowed: Mapping[str, Range],
) -> tuple[Hyperparameter, ...]:
    """The hyperparameters in the signature of `fn`. Raises BadLoss if it is not the signature of a loss."""
    parameters = list(inspect.signature(fn).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = getattr(fn, "__name__", "the loss")
    if len(positional) < 3:
        raise BadLoss(
            f"{name} takes {len(positional)} positional arguments, but a loss is called as "
            f"{name}(model_outputs, loss_fn_inputs, attention_mask, **hyperparameters)"
        )
    keywords = positional[3:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    names = [parameter.name for parameter in keywords]
    for unknown in allowed:
        if unknown not in names:
            raise BadLoss(
                f"{name} has no hyperparameter {unknown!r}, but allowed= names it{did_you_mean(unknown, names)}"
            )
    found = tuple(
        Hyperparameter(
            p.name,
            _type_name(p),
            None if p.default is p.empty else p.default,
            required=p.default is p.empty,
            allowed=allowed.get(p.name),
        )
        for p in keywords
    )
    for hyper in found:
        if not hyper.required and hyper.allowed is not None:
            hyper.check(name, hyper.default)
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


def _has_type(value: object, written: str) -> bool:
    """Whether a value has the type, or one of the types of `a | b`; true for a type that is not in _TYPES."""
    kinds = [kind.strip() for kind in written.split("|")]
    if any(kind not in _TYPES for kind in kinds):
        return True
    if isinstance(value, bool):
        return "bool" in kinds
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


def _type_name(parameter: inspect.Parameter) -> str:
    if parameter.annotation is not parameter.empty:
        annotation = parameter.annotation
        return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return "any" if parameter.default in (parameter.empty, None) else type(parameter.default).__name__
