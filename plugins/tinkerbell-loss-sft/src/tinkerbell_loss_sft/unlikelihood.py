"""Unlikelihood: pushes tokens down."""

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
    """-log(1 - p) of tokens that should not be said, summed (arXiv:1908.04319).

    negative_tokens `[B, T]`, or `[B, T, K]` for K a position, with negative_weights of the same shape; without them
    target_tokens with `weights` are pushed down. For the paper's objective add it to cross_entropy, which reads
    target_tokens and weights. A token of probability 1 costs -log of the float's epsilon, 16 in float32.
    """
    apart = "negative_tokens" in loss_fn_inputs
    tokens = loss_fn_inputs["negative_tokens" if apart else "target_tokens"]  # [B, T] or [B, T, K]
    weights = loss_fn_inputs.get("negative_weights" if apart else "weights")
    mask = effective_mask({} if weights is None else {"weights": weights}, attention_mask)  # [B, T] or [B, T, K]
    if mask.dim() == 3:  # a token that does not count may be no token at all
        tokens = torch.where(mask != 0, tokens, 0)
    where = mask if mask.dim() == 2 else (mask != 0).any(-1)  # [B, T]
    logprobs = target_logprobs(model_outputs, tokens, where=where)
    keep = mask if mask.dim() == logprobs.dim() else mask[..., None].expand(logprobs.shape)
    safe = torch.where(keep != 0, logprobs, -1.0)
    missing = (-torch.expm1(safe)).clamp(min=torch.finfo(safe.dtype).eps)
    diagnostics = {"probability:mean": masked_mean(logprobs.exp(), keep)}
    return LossFnOutput(aggregate(-missing.log(), mask, aggregation), logprobs, diagnostics)
