"""Unlikelihood: lowers the probability of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import aggregate, effective_mask, masked_mean, target_logprobs


@loss(
    coupling="sequence",
    inputs=("target_tokens",),
    optional_inputs=("weights", "negative_tokens", "negative_weights"),
    finite=("weights", "negative_weights"),
)
def unlikelihood(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """-log(1 - p) of unwanted tokens, summed (arXiv:1908.04319).

    negative_tokens: `[B, T]`, or `[B, T, K]` for K tokens per position; negative_weights: the same shape. If there are
    no negative_tokens, the unwanted tokens are target_tokens with `weights`. The objective of the paper is the sum of
    this loss and cross_entropy, which reads target_tokens and weights. The loss of a token is at most -log of the
    dtype's epsilon, 16 in float32.
    """
    apart = "negative_tokens" in loss_fn_inputs
    tokens = loss_fn_inputs["negative_tokens" if apart else "target_tokens"]  # [B, T] or [B, T, K]
    weights = loss_fn_inputs.get("negative_weights" if apart else "weights")
    mask = effective_mask({} if weights is None else {"weights": weights}, attention_mask)  # [B, T] or [B, T, K]
    if mask.dim() == 3:  # a token with weight 0 may have an invalid id
        tokens = torch.where(mask != 0, tokens, 0)
    where = mask if mask.dim() == 2 else (mask != 0).any(-1)  # [B, T]
    logprobs = target_logprobs(model_outputs, tokens, where=where)
    keep = mask if mask.dim() == logprobs.dim() else mask[..., None].expand(logprobs.shape)
    safe = torch.where(keep != 0, logprobs, -1.0)
    missing = (-torch.expm1(safe)).clamp(min=torch.finfo(safe.dtype).eps)
    diagnostics = {"probability:mean": masked_mean(logprobs.exp(), keep)}
    return LossFnOutput(aggregate(-missing.log(), mask, aggregation), logprobs, diagnostics)
