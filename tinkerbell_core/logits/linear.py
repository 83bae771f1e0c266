"""Chunks of logits under a `Head`: products in one buffer, gradients added in place, never a tensor [c, V] more."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tinkerbell_core.logits.gradients import Gradients
from tinkerbell_core.logits.head import Head
from tinkerbell_core.logits.matrix import Matrix
from tinkerbell_core.logits.products import Pull


class LinearProduct:
    """A `Product` whose way back is written by hand.

    frozen: no gradient goes to the head itself; plain: nor is it soft-capped.
    """

    copies = 1

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        self.gradients = Gradients([hidden, *head.parameters()])
        self.frozen = not any(parameter.requires_grad for parameter in head.parameters())
        self.plain = self.frozen and head.softcap is None
        self.vocab, self.dtype = head.weight.shape[0], head.dtype
        self._weight = Matrix(head.weight, head.dtype, self.gradients)
        self._bias = None if head.bias is None else head.bias.detach().to(head.dtype)  # [V]
        self._b: Matrix | None = None
        if head.lora is not None:
            low = head.precision or head.lora.a.dtype
            self._a = head.lora.a.detach().to(low)  # [r, H]
            self._b = Matrix(head.lora.b, low, self.gradients, head.lora.scaling)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """`[c]` -> `[c, V]` in `out`."""
        states = self._states(rows)
        self._weight.write(states, self._bias, out)
        if self._b is not None:
            self._b.add(self._low(states), out)
        return self._finish(out)

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Pull]:
        """The same, with the way back."""
        return self.logits(rows, out), functools.partial(self._pull, rows)

    def bend(self, logits: Tensor) -> float | Tensor:
        """d logits / d products, elementwise, float32 or better."""
        head = self.head
        if head.softcap is None:
            return head.multiplier
        capped = logits.to(torch.promote_types(logits.dtype, torch.float32)) / head.softcap
        return capped.square_().neg_().add_(1).mul_(head.multiplier)

    def states_slope(self, slope: Tensor, rows: Tensor) -> Tensor:
        """The gradient `[c, H]` of the states from that of the products `[c, V]`; the head's go to its buffers."""
        states = self._states(rows)
        down = self._weight.pull(slope, states)
        return down if self._b is None else down + self._pull_low(self._b.pull(slope, self._low(states)), states)

    def at_columns(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits `[c, K]` at columns, int64 `[c, K]`, without a graph, from those rows of the head alone."""
        states = self._states(rows)
        logits = self._weight.at(states, columns)
        if self._bias is not None:
            logits += self._bias.index_select(0, columns.flatten()).view_as(columns)
        if self._b is not None:
            logits += self._b.at(self._low(states), columns).to(logits.dtype)
        return self._finish(logits)

    def pull_columns(self, slope: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add the gradient `[c, K]` of the products at columns to all that is behind them."""
        states = self._states(rows)
        down = self._weight.pull_at(slope, states, columns)
        if self._b is not None:
            down = down + self._pull_low(self._b.pull_at(slope, self._low(states), columns), states)
        self.add_to_rows(down, rows)
        into = None if self.head.bias is None else self.gradients.of(self.head.bias)
        if into is not None:
            into.index_add_(0, columns.flatten(), slope.flatten().to(into.dtype))

    def sums(self, weights: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """What gives `sum weights * logits` of states without softcap: `states @ [H] + scalar`, float32 or better."""
        down = self._weight.sums(weights)
        if self._b is not None:
            down = down + (self._b.sums(weights) @ self._a).to(down.dtype)
        if self._bias is None:
            return down * self.head.multiplier, 0.0
        bias = self._bias.to(down.dtype)
        return down * self.head.multiplier, (bias.sum() if weights is None else weights @ bias) * self.head.multiplier

    def add_to_rows(self, gradient: Tensor, rows: Tensor) -> None:
        """Add a gradient `[c, H]` to those rows of the states."""
        into = self.gradients.of(self.hidden)
        if into is not None:
            into.index_add_(0, rows, gradient.to(into.dtype))

    def _pull(self, rows: Tensor, slope: Tensor) -> None:
        into = None if self.head.bias is None else self.gradients.of(self.head.bias)
        if into is not None:
            into.add_(slope.sum(0, dtype=into.dtype))
        self.add_to_rows(self.states_slope(slope, rows), rows)

    def _pull_low(self, d_low: Tensor, states: Tensor) -> Tensor:
        """The gradient `[c, r]` of the low-rank states -> its share `[c, H]` of the states'; a's is added."""
        assert self.head.lora is not None
        into = self.gradients.of(self.head.lora.a)
        if into is not None:
            into.addmm_(d_low.t().to(into.dtype), states.to(into.dtype))
        return (d_low @ self._a).to(states.dtype)

    def _low(self, states: Tensor) -> Tensor:
        return states.to(self._a.dtype) @ self._a.t()  # [c, r]

    def _states(self, rows: Tensor) -> Tensor:
        return self.hidden.detach()[rows].to(self.dtype)  # [c, H]

    def _finish(self, logits: Tensor) -> Tensor:
        if self.head.multiplier != 1:
            logits.mul_(self.head.multiplier)
        return logits if self.head.softcap is None else logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
