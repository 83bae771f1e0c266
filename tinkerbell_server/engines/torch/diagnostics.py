"""Diagnostics of micro-batches become those of the call, fetched from the device in one copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Diagnostics:
    """A name may end in `:sum`, `:mean`, `:min` or `:max`; without one it is a mean weighted by sequences."""

    def __init__(self) -> None:
        self._values: list[tuple[str, float | Tensor, int]] = []

    def add(self, diagnostics: Mapping[str, float | Tensor], sequences: int) -> None:
        """Those of one micro-batch of so many sequences (or groups)."""
        self._values += [(name, value, sequences) for name, value in diagnostics.items()]

    def fetch(self, others: Sequence[Tensor]) -> tuple[list[float], dict[str, float]]:
        """Scalars `others` of the same device as floats, and the combined diagnostics."""
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
