"""What the losses here are made of: the logit of one token of the vocabulary, read as a score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.functional import counted_rows, spread_rows

Inputs = Mapping[str, Tensor]


def scores(model_outputs: Tensor, mask: Tensor, token: int) -> Tensor:
    """The logit of `token` at each position that counts, `[B, T]`, 0 elsewhere: its row of the head scores.

    Raises BadHyperparameter for a token that the vocabulary has not.
    """
    vocabulary = model_outputs.shape[-1]
    if not 0 <= token < vocabulary:
        raise BadHyperparameter(f"token {token} is to give the scores, but token ids go from 0 to {vocabulary - 1}")
    score = counted_rows(model_outputs, mask)[..., token]
    return spread_rows(score.to(torch.promote_types(score.dtype, torch.float32)), mask)


def rewards(model_outputs: Tensor, mask: Tensor, token: int) -> Tensor:
    """The score at the last position of each row that counts, `[B]`; 0 where none does."""
    counts = mask != 0  # [B, T]
    last = counts & (counts.cumsum(-1) == counts.sum(-1, keepdim=True))
    return scores(model_outputs, last, token).sum(-1)
