"""The language-model head: computes logits from hidden states, with bias, LoRA, multiplier and soft-capping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A low-rank addition to the weight of a head: scaling * b @ a. a: `[r, H]`, b: `[V, r]`."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """softcap * tanh(multiplier * (states @ weight.T + bias + lora) / softcap), in the weight's dtype.

    weight: `[V, H]`. bias: `[V]`. precision: the dtype of the products, if not that of the weight (as in autocast).
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: Lora | None = None
    multiplier: float = 1.0
    softcap: float | None = None
    precision: torch.dtype | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[..., V]` for states `[..., H]`."""
        dtype = self.dtype
        states = states.to(dtype)
        logits = F.linear(states, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        if self.lora is not None:
            low = self.precision or self.lora.a.dtype
            delta = F.linear(F.linear(states.to(low), self.lora.a.to(low)), self.lora.b.to(low))
            logits = (logits + delta * self.lora.scaling).to(dtype)
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def parameters(self) -> Iterator[Tensor]:
        """The tensors of the head, including frozen ones."""
        yield self.weight
        if self.bias is not None:
            yield self.bias
        if self.lora is not None:
            yield self.lora.a
            yield self.lora.b

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.precision or self.weight.dtype
