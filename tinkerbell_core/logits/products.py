"""Chunks of logits [c, V] from rows of hidden states, and the way back for a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinkerbell_core.logits.gradients import Gradients
from tinkerbell_core.logits.head import Head

# Takes the gradient [c, V] of what makes a chunk of logits, in their dtype, back to the tensors behind it.
Pull = Callable[[Tensor], None]


class Product(Protocol):
    """Logits of rows. copies: how many `[c, V]` tensors of its dtype a chunk holds, forward or backward."""

    hidden: Tensor
    gradients: Gradients
    vocab: int
    dtype: torch.dtype
    copies: int

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """`[c]` -> `[c, V]` in `out`, without a graph."""
        ...

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Pull]:
        """The same, with the way back; `out` may be overwritten before it is taken."""
        ...

    def bend(self, logits: Tensor) -> float | Tensor:
        """d logits / d what a pull takes the gradient of, elementwise, float32 or better."""
        ...


class AnyProduct:
    """Of a head of any kind, differentiated by autograd."""

    copies = 4

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self.hidden, self._head = hidden, head
        parameters = head.parameters() if isinstance(head, nn.Module | Head) else ()
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.gradients = Gradients([hidden, *self._parameters])
        with torch.no_grad():
            sample = head(hidden.new_zeros(1, hidden.shape[-1]))  # [1, V]
        self.vocab, self.dtype = sample.shape[-1], sample.dtype

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """`[c]` -> `[c, V]` in `out`."""
        with torch.no_grad():
            return out.copy_(self._head(self.hidden[rows]))

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Pull]:
        """The same, with the way back."""
        states = self.hidden.detach()[rows].requires_grad_(self.hidden.requires_grad)  # [c, H]
        with torch.enable_grad():
            logits = self._head(states)  # [c, V]

        def pull(slope: Tensor) -> None:
            leaves: list[Any] = [t for t in (states, *self._parameters) if t.requires_grad]  # Any: torch's own type
            found = torch.autograd.grad(logits, leaves, slope, allow_unused=True)
            for leaf, gradient in zip(leaves, found, strict=True):
                into = self.gradients.of(self.hidden if leaf is states else leaf)
                if into is None or gradient is None:
                    continue
                if leaf is states:
                    into.index_add_(0, rows, gradient.to(into.dtype))
                else:
                    into.add_(gradient)

        return out.copy_(logits.detach()), pull

    def bend(self, logits: Tensor) -> float | Tensor:
        """Autograd goes through all of the head."""
        return 1.0
