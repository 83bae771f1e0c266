"""Stored logits with a reference to their hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain_logits(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits `[B, T, V]` of hidden states `[B, T, H]`, in float32 or better, as an ordinary tensor.

    `functional.hidden_states` accepts the result, but not a tensor that is computed from it.
    """
    logits = head(hidden)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    # an attribute and not a subclass, which would slow down every tensor that is computed from it
    logits.hidden_states = hidden  # type: ignore[attr-defined]
    return logits
