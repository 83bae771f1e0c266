"""Cross-entropy with tokens weighted by their probability under the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import aggregate, effective_mask, masked_mean, target_logprobs


def _diagnostics(logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "nll:mean": masked_mean(-logprobs, mask),
        "probability:mean": masked_mean(logprobs.exp(), mask),
    }


@loss(coupling="sequence", inputs=("target_tokens",), optional_inputs=("weights",), finite=("weights",))
def dft(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """-p, detached, * log p, summed: dynamic fine-tuning (arXiv:2508.05629).

    The factor p lowers the weight of unlikely tokens, which have the largest gradients in cross-entropy. twinkle does
    not detach p: its value is the same, its gradient differs. target_tokens and weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    per_token = -logprobs.detach().exp() * logprobs
    return LossFnOutput(aggregate(per_token, mask, aggregation), logprobs, _diagnostics(logprobs, mask))


@loss(coupling="sequence", inputs=("target_tokens",), optional_inputs=("weights",), finite=("weights",))
def focal(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    gamma: float = 2.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-(1 - p)^gamma * log p, summed: focal loss, likely tokens have less weight (arXiv:1708.02002).

    With gamma 0 it is cross-entropy. target_tokens and weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    safe = torch.where(mask != 0, logprobs, -1.0)
    # the derivative of a power below 1 is infinite at 0
    missing = (-torch.expm1(safe)).clamp(min=torch.finfo(safe.dtype).eps)
    return LossFnOutput(
        aggregate(-missing.pow(gamma) * safe, mask, aggregation), logprobs, _diagnostics(logprobs, mask)
    )
