"""The keyword arguments of a loss: their types and ranges, and what one call gives them. Never imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinkerbell_core.errors import BadHyperparameter, BadLoss, did_you_mean


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, each end in it unless it is open; None is no end. NaN is in no range."""

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
    """Numbers above `low`: what is divided by is above(0)."""
    return Range(low, low_open=True)


def at_least(low: float) -> Range:
    """`low` and more: what counts something is at_least(1)."""
    return Range(low)


SHARE = Range(0, 1)
"""A part of a whole."""


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A keyword argument of a loss. `type` is the annotation as written; `required` ones have no default.

    allowed: which numbers it may be, None where the loss does not say.
    """

    name: str
    type: str
    default: bool | int | float | str | None = None
    required: bool = False
    allowed: Range | None = None

    def check(self, loss: str, value: object) -> None:
        """Raise BadHyperparameter for a value of another type, or out of range."""
        if not _has_type(value, self.type):
            raise BadHyperparameter(f"loss {loss!r}: {self.name} is {value!r}, but must be {self.type}")
        if self.allowed is None or value is None or isinstance(value, str):
            return
        if not isinstance(value, int | float) or value not in self.allowed:
            raise BadHyperparameter(f"loss {loss!r}: {self.name} is {value!r}, but must be {self.allowed}")


def bind_hyperparameters(loss: str, known: tuple[Hyperparameter, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` over the defaults of `known`; the server binds from a description, where there is no function."""
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
    fn: Callable[..., Any],  # Any: whatever a loss takes and gives
    allowed: Mapping[str, Range],
) -> tuple[Hyperparameter, ...]:
    """What the signature of `fn` says, with the ranges. Raises BadLoss where it cannot be that of a loss."""
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
                f"{name} has no hyperparameter {unknown!r} to be {allowed[unknown]}{did_you_mean(unknown, names)}"
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
    """Whether it is of the type, or of one of `a | b`; true where a type is none that can be told."""
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
