"""Where logits come from: one question put to rows of `[N, V]` logits that nobody stores. A row is one position."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Statistic = Literal["logsumexp", "entropy", "total", "dot", "expectation"]


class Reading(NamedTuple):
    """Answers about n rows of scaled logits z `[n, V]`; None where not asked. All but columns are differentiable.

    columns, values: int64 `[n, K]` and z at them. logsumexp, entropy: `[n]`, of softmax(z). total: `[n]`, the sum of z
    over V. dot: `[n]`, the sum of weights * z. expectation: `[n]`, the sum of weights * softmax(z).
    """

    columns: Tensor | None = None
    values: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    total: Tensor | None = None
    dot: Tensor | None = None
    expectation: Tensor | None = None


class LogitsSource(Protocol):
    """N rows of V logits. Values are differentiable with respect to `anchors()`, the tensors behind the rows.

    dtype is float32 or better, whatever the model's.
    """

    count: int
    vocab: int
    dtype: torch.dtype
    device: torch.device

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        """Answers about int64 rows `[n]` (repeats allowed), logits times scale: a float, or `[n]`, one a row.

        pick: columns `[n, K]`, or the number of largest ones, in falling order. weights: `[n, V]` or `[V]`, constants,
        for dot and expectation. What needs no gradient is read under torch.no_grad.
        """
        ...

    def full(self, rows: Tensor) -> Tensor:
        """The rows themselves, unscaled: `[n]` -> `[n, V]`."""
        ...

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden states of rows, after the final norm: `[n]` -> `[n, H]`."""
        ...

    def anchors(self) -> list[Tensor]:
        """The tensors a gradient may flow to; empty under a frozen model without a leaf."""
        ...
