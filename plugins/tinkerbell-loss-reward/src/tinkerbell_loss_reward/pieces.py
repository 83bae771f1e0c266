"""Shared parts of the losses: a score is the logit of one token of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.functional import counted_rows, spread_rows

Inputs = Mapping[str, Tensor]


def scores(model_outputs: Tensor, mask: Tensor, token: int) -> Tensor:
    """The logit of `token` at each counted position, `[B, T]`, 0 elsewhere.

    Raises BadHyperparameter if the vocabulary does not contain the token.
    """
    vocabulary = model_outputs.shape[-1]
    if not 0 <= token < vocabulary:
        raise BadHyperparameter(
            f"the score token is {token}, but the token ids of this model are 0 to {vocabulary - 1}"
        )
    score = counted_rows(model_outputs, mask)[..., token]
    return spread_rows(score.to(torch.promote_types(score.dtype, torch.float32)), mask)


def rewards(model_outputs: Tensor, mask: Tensor, token: int) -> Tensor:
    """The score at the last counted position of each row, `[B]`; 0 if a row has no counted position."""
    counts = mask != 0  # [B, T]
    last = counts & (counts.cumsum(-1) == counts.sum(-1, keepdim=True))
    return scores(model_outputs, last, token).sum(-1)
