"""The interface through which a loss reads rows of logits `[N, V]` that are not stored. A row is one position."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Statistic = Literal["logsumexp", "entropy", "total", "dot", "expectation"]


class Reading(NamedTuple):
    """The results of reading n rows of scaled logits z `[n, V]`; None for a result that was not requested.

    columns, values: int64 `[n, K]`, and z at these columns. logsumexp: `[n]`. entropy: `[n]`, of softmax(z). total:
    `[n]`, the sum of z over V. dot: `[n]`, the sum of weights * z. expectation: `[n]`, the sum of weights * softmax(z).
    All except columns are differentiable.
    """

    columns: Tensor | None = None
    values: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    total: Tensor | None = None
    dot: Tensor | None = None
    expectation: Tensor | None = None


class LogitsSource(Protocol):
    """N rows of V logits. Results are differentiable with respect to `anchors()`, from which the rows are computed.

    count: N. vocab: V. dtype: float32 or better, for any dtype of the model.
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
        """Read int64 rows `[n]`, which may repeat, of the logits times scale: a float, or `[n]`.

        pick: columns `[n, K]`, or the number of largest ones, in descending order. want: the statistics to compute.
        weights: constants `[n, V]` or `[V]`, for dot and expectation. Call it under torch.no_grad for results without a
        gradient.
        """
        ...

    def full(self, rows: Tensor) -> Tensor:
        """The logits of rows, unscaled: `[n]` -> `[n, V]`."""
        ...

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden states of rows after the final norm: `[n]` -> `[n, H]`."""
        ...

    def anchors(self) -> list[Tensor]:
        """The tensors to which a gradient may flow; empty if the hidden states and the head are all constants."""
        ...
