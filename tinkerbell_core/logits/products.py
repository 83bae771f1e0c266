"""Chunks of logits [c, V] from rows of hidden states, and the way back for a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinkerbell_core.logits.gradients import Gradients
from tinkerbell_core.logits.head import Head

# A chunk of logits and what takes its gradient [c, V], of the logits' dtype, back to the tensors behind it.
Chunk = tuple[Tensor, Callable[[Tensor], None]]


class Product(Protocol):
    """Logits of rows. copies: how many [c, V] tensors of its dtype a chunk holds, forward or backward."""

    hidden: Tensor
    gradients: Gradients
    vocab: int
    dtype: torch.dtype
    copies: int

    def logits(self, rows: Tensor) -> Tensor:
        """`[c]` -> `[c, V]`, without a graph; may be overwritten by the caller."""
        ...

    def chunk(self, rows: Tensor) -> Chunk:
        """The same, ready for backward."""
        ...


class AnyProduct:
    """Of a head of any kind, differentiated by autograd."""

    copies = 4

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self.hidden, self.head = hidden, head
        self.parameters = (
            [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module | Head) else []
        )
        self.gradients = Gradients([hidden, *self.parameters])
        with torch.no_grad():
            sample = head(hidden[:1])  # [1, V]
        self.vocab, self.dtype = sample.shape[-1], sample.dtype

    def logits(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(self.hidden[rows]).clone()

    def chunk(self, rows: Tensor) -> Chunk:
        states = self.hidden.detach()[rows].requires_grad_(self.hidden.requires_grad)  # [c, H]
        with torch.enable_grad():
            logits = self.head(states)
        leaves: list[Any] = [t for t in (states, *self.parameters) if t.requires_grad]

        def pull(gradient: Tensor) -> None:
            found = list(torch.autograd.grad(logits, leaves, gradient, allow_unused=True))
            into = self.gradients.of(self.hidden)
            if into is not None:
                more = found.pop(0)
                if more is not None:
                    into.index_add_(0, rows, more.to(into.dtype))
            for parameter, more in zip(self.parameters, found, strict=True):
                sum_ = self.gradients.of(parameter)
                if sum_ is not None and more is not None:
                    sum_.add_(more)

        return logits.detach(), pull
