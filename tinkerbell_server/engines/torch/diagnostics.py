"""Combines the diagnostics of micro-batches into those of the call, with one copy from the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Diagnostics:
    """The suffix of a name, `:sum`, `:mean`, `:min` or `:max`, defines how its values are combined.

    Without a suffix, the result is the mean weighted by sequences.
    """

    def __init__(self) -> None:
        self._values: list[tuple[str, float | Tensor, int]] = []

    def add(self, diagnostics: Mapping[str, float | Tensor], sequences: int) -> None:
        """Add the diagnostics of one micro-batch. sequences: its number of sequences, or of groups."""
        self._values += [(name, value, sequences) for name, value in diagnostics.items()]

    def fetch(self, others: Sequence[Tensor]) -> tuple[list[float], dict[str, float]]:
        """The values of the scalars `others`, and the combined diagnostics."""
        tensors = [value for _, value, _ in self._values if isinstance(value, Tensor)]
        device = others[0].device
        scalars = [scalar.detach().to(device, torch.float64).reshape(()) for scalar in (*others, *tensors)]
        fetched: list[float] = torch.stack(scalars).tolist()
        numbers = iter(fetched[len(others) :])
        by_name: dict[str, list[tuple[float, int]]] = {}
        for name, value, sequences in self._values:
            number = next(numbers) if isinstance(value, Tensor) else float(value)
            by_name.setdefault(name, []).append((number, sequences))
        combined = {name: _COMBINE.get(name.partition(":")[2], _mean)(values) for name, values in by_name.items()}
        return fetched[: len(others)], combined


def _mean(values: list[tuple[float, int]]) -> float:
    return sum(number * sequences for number, sequences in values) / sum(sequences for _, sequences in values)


_COMBINE: dict[str, Callable[[list[tuple[float, int]]], float]] = {
    "sum": lambda values: sum(number for number, _ in values),
    "min": lambda values: min(number for number, _ in values),
    "max": lambda values: max(number for number, _ in values),
    "mean": _mean,
}
