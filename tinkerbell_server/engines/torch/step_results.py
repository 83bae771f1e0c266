"""Collects the results of the micro-batches of one step, on the device, and fetches them once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadData, BadLoss, did_you_mean
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.engines.torch.batching import Batch


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


@dataclass(frozen=True, slots=True)
class StepResult:
    """logprobs: `[T]` or `[T, K]` on the CPU for each row, in the order of the rows; None if the loss gives none.

    read: the inputs that the loss has read.
    """

    loss: float
    diagnostics: dict[str, float]
    logprobs: list[Tensor] | None
    counted_tokens: int
    micro_batches: int
    read: frozenset[str] = frozenset()


_READ_BY_THE_SERVER = frozenset({"target_tokens", "weights"})
"""Inputs that the server adds to text, and that count tokens."""


class StepResults:
    """The results so far of a step on `rows` rows. read: the inputs that the loss has read."""

    def __init__(self, spec: LossSpec, rows: int) -> None:
        self.read: set[str] = set()
        self._spec = spec
        self._losses: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._diagnostics = Diagnostics()
        self._logprobs: list[Tensor | None] = [None] * rows

    def add(self, batch: Batch, rows: Sequence[int], output: LossFnOutput, leaf: Tensor, *, backward: bool) -> None:
        """Add the output of the loss on these rows; with `backward`, compute its gradient for the leaf and the head."""
        if backward:
            torch.autograd.backward(output.loss)
            if leaf.grad is not None:
                self._finite.append(leaf.grad.isfinite().all())
        self._losses.append(output.loss.detach())
        self._counted.append(batch.counted_tokens())
        self._diagnostics.add(output.diagnostics, len(rows) // self._spec.group_size)
        if output.logprobs is not None:
            logprobs = output.logprobs.detach()
            for position, row in enumerate(rows):
                self._logprobs[row] = logprobs[position, : batch.lengths[position]]

    def check_read(self, inputs: Iterable[str]) -> None:
        """Raise BadData if the loss has not read one of these inputs, which then has no effect."""
        unread = [name for name in inputs if name not in self.read and name not in _READ_BY_THE_SERVER]
        if unread:
            reads = ", ".join(sorted(self.read)) or "none"
            raise BadData(
                f"loss {self._spec.name!r} has not read the input {unread[0]!r} in this call, so it would have no "
                f"effect: leave it out{did_you_mean(unread[0], self.read)} (it has read: {reads})"
            )

    def fetch(self, parameters: Sequence[Parameter], micro_batches: int) -> StepResult:
        """The result of the step, copied from the device.

        Raises BadLoss if the loss, or the gradient of a parameter, is not finite.
        """
        loss = torch.stack([loss.double() for loss in self._losses]).sum()
        numbers = [loss, torch.stack(self._counted).sum().double(), self._all_finite(parameters, loss)]
        (value, counted, finite), diagnostics = self._diagnostics.fetch(numbers)
        name = self._spec.name
        if not math.isfinite(value):
            raise BadLoss(
                f"the value of loss {name!r} is {value}, so nothing was accumulated: look for a log or a division"
            )
        if not finite:
            raise BadLoss(
                f"the value of loss {name!r} is finite, but its gradient contains NaN or infinity, so nothing was "
                "accumulated: mask with torch.where BEFORE exp, log or a division, not after"
            )
        logprobs = [logprobs.cpu() for logprobs in self._logprobs if logprobs is not None]
        return StepResult(value, diagnostics, logprobs or None, int(counted), micro_batches, frozenset(self.read))

    def _all_finite(self, parameters: Sequence[Parameter], like: Tensor) -> Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        finite = list(self._finite)
        if gradients:
            finite.append(torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all())
        return torch.stack(finite).all().double() if finite else torch.ones_like(like)
