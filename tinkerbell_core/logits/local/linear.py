"""Chunks of logits of a `Head`: one buffer `[c, V]` per chunk, and gradients that are accumulated in place."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tinkerbell_core.logits.head import Head
from tinkerbell_core.logits.local.matrix import Gradients, Matrix
from tinkerbell_core.logits.local.products import Backward


class LinearProduct:
    """A `Product` with an explicit backward pass.

    frozen: the head does not require a gradient. plain: it is also not soft-capped.
    """

    copies = 1

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        parameters = list(head.parameters())
        self.gradients = Gradients([hidden, *parameters])
        self.frozen = not any(parameter.requires_grad for parameter in parameters)
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

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Backward]:
        """The same, and the backward function of the chunk."""
        return self.logits(rows, out), functools.partial(self._backward, rows)

    def head_derivative(self, logits: Tensor) -> float | Tensor:
        """d logits / d products, elementwise, in float32 or better."""
        head = self.head
        if head.softcap is None:
            return head.multiplier
        capped = logits.to(torch.promote_types(logits.dtype, torch.float32)) / head.softcap
        return capped.square_().neg_().add_(1).mul_(head.multiplier)

    def states_grad(self, grad: Tensor, rows: Tensor) -> Tensor:
        """The gradient `[c, H]` of the states from that of the products `[c, V]`. Adds those of the head to buffers."""
        states = self._states(rows)
        total = self._weight.backward(grad, states)
        if self._b is not None:
            total = total + self._backward_low(self._b.backward(grad, self._low(states)), states)
        return total

    def at_columns(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits `[c, K]` at columns, int64 `[c, K]`, without a graph, from the matching rows of the weight."""
        states = self._states(rows)
        logits = self._weight.at(states, columns)
        if self._bias is not None:
            logits += self._bias.index_select(0, columns.flatten()).view_as(columns)
        if self._b is not None:
            logits += self._b.at(self._low(states), columns).to(logits.dtype)
        return self._finish(logits)

    def backward_columns(self, grad: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add the gradient `[c, K]` of the products at columns to all buffers."""
        states = self._states(rows)
        total = self._weight.backward_at(grad, states, columns)
        if self._b is not None:
            total = total + self._backward_low(self._b.backward_at(grad, self._low(states), columns), states)
        self.add_to_rows(total, rows)
        into = None if self.head.bias is None else self.gradients.buffer(self.head.bias)
        if into is not None:
            into.index_add_(0, columns.flatten(), grad.flatten().to(into.dtype))

    def sums(self, weights: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """(vector `[H]`, constant): states @ vector + constant is the sum of weights * logits, if not soft-capped."""
        vector = self._weight.sums(weights)
        if self._b is not None:
            vector = vector + (self._b.sums(weights) @ self._a).to(vector.dtype)
        vector = vector * self.head.multiplier
        if self._bias is None:
            return vector, 0.0
        bias = self._bias.to(vector.dtype)
        return vector, (bias.sum() if weights is None else weights @ bias) * self.head.multiplier

    def add_to_rows(self, gradient: Tensor, rows: Tensor) -> None:
        """Add a gradient `[c, H]` to those rows of the states."""
        into = self.gradients.buffer(self.hidden)
        if into is not None:
            into.index_add_(0, rows, gradient.to(into.dtype))

    def _backward(self, rows: Tensor, grad: Tensor) -> None:
        into = None if self.head.bias is None else self.gradients.buffer(self.head.bias)
        if into is not None:
            into.add_(grad.sum(0, dtype=into.dtype))
        self.add_to_rows(self.states_grad(grad, rows), rows)

    def _backward_low(self, d_low: Tensor, states: Tensor) -> Tensor:
        """The gradient `[c, H]` of the states from that of the low-rank states `[c, r]`. Adds that of a to a buffer."""
        assert self.head.lora is not None
        into = self.gradients.buffer(self.head.lora.a)
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
