"""How a record of a peer's numbers is said in our terms: which loss, which hyperparameters, which inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]  # Any: JSON, see `docs` of the file's own `meta`
Tensors = dict[str, Tensor]
Value = bool | int | float | str | None


@dataclass(frozen=True)
class Their:
    """A hyperparameter of ours that is the record's `key`, perhaps by another scale; `default` where it has none."""

    key: str
    change: Callable[[Any], Value] = lambda value: value  # Any: a number, or whatever the peer calls a setting
    default: Value | None = None

    def of(self, record: Record) -> Value:
        given = record["hyperparams"].get(self.key)
        if given is None:
            if self.default is None:
                raise KeyError(f"{record['id']} has no hyperparameter {self.key!r}: {record['hyperparams']}")
            given = self.default
        return self.change(given)


def as_logits(tensors: Tensors, leaf: Tensor) -> Tensor:
    """The model's outputs of a record that holds logits `[B, T, V]`."""
    return leaf


@dataclass(frozen=True)
class Part:
    """A loss to add: its name, what it is multiplied by, its hyperparameters."""

    ours: str
    weight: Value | Their | Callable[[Record], Value]
    config: Mapping[str, Value | Their | Callable[[Record], Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One line of a mapping: "the peers' `loss` is our `ours`", or, with `reason`, why it is none of ours.

    peers, losses: patterns (`*` for any). where: narrows further by the record's other fields.
    config: our hyperparameter → a value, or `Their(key)`. inputs: our input → the record's, or a function of all.
    outputs: the model's outputs from the tensor the gradient is taken in. scale: what our loss is multiplied by.
    plus: losses of the same inputs that are added to ours.
    """

    peers: str | Sequence[str]
    losses: str | Sequence[str]
    ours: str = ""
    config: Mapping[str, Value | Their | Callable[[Record], Value]] = field(default_factory=dict)
    inputs: Mapping[str, str | Callable[[Tensors], Tensor]] = field(default_factory=dict)
    where: Callable[[Record], bool] = lambda record: True
    outputs: Callable[[Tensors, Tensor], Tensor] = as_logits
    scale: Callable[[Record], float] = lambda record: 1.0
    plus: Sequence[Part] = ()
    reason: str = ""
    note: str = ""

    def takes(self, record: Record) -> bool:
        return (
            _matches(record["id"].partition("/")[0], self.peers)
            and _matches(record["loss"], self.losses)
            and self.where(record)
        )

    def config_of(self, record: Record) -> dict[str, Value]:
        """Our hyperparameters for this record."""
        return _values(self.config, record)

    def parts(self, record: Record) -> Iterator[tuple[str, float, dict[str, Value]]]:
        """Our loss and those added to it, but for those of weight 0: name, weight, hyperparameters."""
        yield self.ours, self.scale(record), self.config_of(record)
        for part in self.plus:
            weight = float(_value(part.weight, record) or 0.0)
            if weight:
                yield part.ours, weight, _values(part.config, record)

    def inputs_of(self, tensors: Tensors) -> Tensors:
        """Our inputs for this record's tensors."""
        return {
            ours: theirs(tensors) if callable(theirs) else tensors[theirs]
            for ours, theirs in self.inputs.items()
            if callable(theirs) or theirs in tensors
        }


def tensor(value: Mapping[str, Any]) -> Tensor:  # Any: JSON
    """A tensor of a record: `{dtype, shape, data}`."""
    return torch.tensor(value["data"], dtype=getattr(torch, value["dtype"])).view(value["shape"])


def _values(config: Mapping[str, Value | Their | Callable[[Record], Value]], record: Record) -> dict[str, Value]:
    return {name: _value(value, record) for name, value in config.items()}


def _value(value: Value | Their | Callable[[Record], Value], record: Record) -> Value:
    if isinstance(value, Their):
        return value.of(record)
    return value(record) if callable(value) else value


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)
