"""The interface that computes chunks of logits `[c, V]` from hidden states, and its version for any head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinkerbell_core.logits.head import Head
from tinkerbell_core.logits.local.matrix import Gradients

# takes the gradient [c, V] of a chunk, in the dtype of the logits, and adds the gradients of the tensors to buffers
Backward = Callable[[Tensor], None]


class Product(Protocol):
    """Computes logits of rows. copies: the number of `[c, V]` tensors that a chunk needs at once."""

    hidden: Tensor
    gradients: Gradients
    vocab: int
    dtype: torch.dtype
    copies: int

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """`[c]` -> `[c, V]` in `out`, without a graph."""
        ...

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Backward]:
        """The same, and the backward function of the chunk, which may be called after `out` is overwritten."""
        ...

    def head_derivative(self, logits: Tensor) -> float | Tensor:
        """d logits / d (the tensor whose gradient the backward function takes), elementwise, in float32 or better."""
        ...


class AnyProduct:
    """For any callable head, differentiated by autograd."""

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

    def chunk(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Backward]:
        """The same, and the backward function of the chunk."""
        states = self.hidden.detach()[rows].requires_grad_(self.hidden.requires_grad)  # [c, H]
        with torch.enable_grad():
            logits = self._head(states)  # [c, V]

        def backward(grad: Tensor) -> None:
            leaves: list[Any] = [t for t in (states, *self._parameters) if t.requires_grad]  # Any: as torch declares it
            found = torch.autograd.grad(logits, leaves, grad, allow_unused=True)
            for leaf, gradient in zip(leaves, found, strict=True):
                into = self.gradients.buffer(self.hidden if leaf is states else leaf)
                if into is None or gradient is None:
                    continue
                if leaf is states:
                    into.index_add_(0, rows, gradient.to(into.dtype))
                else:
                    into.add_(gradient)

        return out.copy_(logits.detach()), backward

    def head_derivative(self, logits: Tensor) -> float | Tensor:
        """1, because autograd differentiates the whole head."""
        return 1.0
