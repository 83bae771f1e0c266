"""Stored logits that remember the hidden states they came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain_logits(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits `[B, T, V]` of hidden states `[B, T, H]`, float32 or better, for `functional.hidden_states` to read.

    An ordinary tensor: every operation on it is torch's own, and gives a tensor that carries no hidden states.
    """
    logits = head(hidden)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    # torch has no declared place for this; a subclass would slow and spread to all that is computed from it.
    logits.hidden_states = hidden  # type: ignore[attr-defined]
    return logits
