"""Shared parts of the losses: one embedding per row, computed from the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.errors import BadHyperparameter, did_you_mean
from tinkerbell_core.functional import hidden_states

Inputs = Mapping[str, Tensor]
Pooling = Literal["last", "mean"]


def embeddings(model_outputs: Tensor, mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """One vector per row, `[B, H]`: the hidden state at the last counted position, or the mean of all; 0 for none.

    Raises BadHyperparameter if the pooling is neither "last" nor "mean".
    """
    if pooling not in get_args(Pooling):
        known = get_args(Pooling)
        raise BadHyperparameter(f"no pooling {pooling!r}{did_you_mean(pooling, known)} (available: {', '.join(known)})")
    hidden = hidden_states(model_outputs)  # [B, T, H]
    counts = mask != 0  # [B, T]
    if pooling == "last":
        counts = counts & (counts.cumsum(-1) == counts.sum(-1, keepdim=True))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.masked_fill(~counts[..., None], 0.0).sum(1, dtype=dtype)  # [B, H]
    pooled = total / counts.sum(-1, keepdim=True).clamp(min=1)
    return F.normalize(pooled, dim=-1) if normalize else pooled
