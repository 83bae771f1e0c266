"""The form of a mapping entry: it names our loss, hyperparameters and inputs for a record of another project."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]  # Any: JSON, described in `docs` of the `meta` of each file
Tensors = dict[str, Tensor]
Value = bool | int | float | str | None


@dataclass(frozen=True)
class RecordValue:
    """The value of our hyperparameter: `change` of the hyperparameter `key` of the record, or of `default`."""

    key: str
    change: Callable[[Any], Value] = lambda value: value  # Any: a number, or another JSON value
    default: Value | None = None

    def of(self, record: Record) -> Value:
        given = record["hyperparams"].get(self.key)
        if given is None:
            if self.default is None:
                raise KeyError(f"{record['id']} has no hyperparameter {self.key!r}: {record['hyperparams']}")
            given = self.default
        return self.change(given)


def as_logits(tensors: Tensors, leaf: Tensor) -> Tensor:
    """The model outputs for a record of logits `[B, T, V]`."""
    return leaf


@dataclass(frozen=True)
class Part:
    """A loss to add, with its weight and hyperparameters."""

    ours: str
    weight: Value | RecordValue | Callable[[Record], Value]
    config: Mapping[str, Value | RecordValue | Callable[[Record], Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One entry of a mapping: our loss `ours` equals the losses of the peers, or `reason` is why we have no such loss.

    peers, losses: patterns (`*` for any). where: a condition on the other fields of the record.
    config: our hyperparameter → a value, or `RecordValue(key)`. inputs: our input → the name of a tensor of the record,
    or a function of all its tensors. outputs: the model outputs from the tensor whose gradient is compared.
    scale: a factor of our loss. plus: losses of the same inputs to add.
    """

    peers: str | Sequence[str]
    losses: str | Sequence[str]
    ours: str = ""
    config: Mapping[str, Value | RecordValue | Callable[[Record], Value]] = field(default_factory=dict)
    inputs: Mapping[str, str | Callable[[Tensors], Tensor]] = field(default_factory=dict)
    where: Callable[[Record], bool] = lambda record: True
    outputs: Callable[[Tensors, Tensor], Tensor] = as_logits
    scale: Callable[[Record], float] = lambda record: 1.0
    plus: Sequence[Part] = ()
    reason: str = ""
    note: str = ""

    def matches(self, record: Record) -> bool:
        return (
            _matches(record["id"].partition("/")[0], self.peers)
            and _matches(record["loss"], self.losses)
            and self.where(record)
        )

    def config_of(self, record: Record) -> dict[str, Value]:
        """Our hyperparameters for this record."""
        return _values(self.config, record)

    def parts(self, record: Record) -> Iterator[tuple[str, float, dict[str, Value]]]:
        """(name, weight, hyperparameters) of our loss and of the losses to add, except those with weight 0."""
        yield self.ours, self.scale(record), self.config_of(record)
        for part in self.plus:
            weight = float(_value(part.weight, record) or 0.0)
            if weight:
                yield part.ours, weight, _values(part.config, record)

    def inputs_of(self, tensors: Tensors) -> Tensors:
        """Our inputs for the tensors of this record."""
        return {
            ours: theirs(tensors) if callable(theirs) else tensors[theirs]
            for ours, theirs in self.inputs.items()
            if callable(theirs) or theirs in tensors
        }


def tensor(value: Mapping[str, Any]) -> Tensor:  # Any: JSON
    """A tensor of a record: `{dtype, shape, data}`."""
    return torch.tensor(value["data"], dtype=getattr(torch, value["dtype"])).view(value["shape"])


def _values(config: Mapping[str, Value | RecordValue | Callable[[Record], Value]], record: Record) -> dict[str, Value]:
    return {name: _value(value, record) for name, value in config.items()}


def _value(value: Value | RecordValue | Callable[[Record], Value], record: Record) -> Value:
    if isinstance(value, RecordValue):
        return value.of(record)
    return value(record) if callable(value) else value


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)
