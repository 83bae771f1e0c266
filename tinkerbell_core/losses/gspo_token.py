"""Group sequence policy optimisation, token form: a ratio per sequence, advantages per token (arXiv:2507.18071)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.functional import aggregate, counted, effective_mask, masked_mean, sequence_sum, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import hookimpl
from tinkerbell_core.spec import LossSpec


@loss(
    coupling="sequence",
    inputs=("target_tokens", "logprobs", "advantages"),
    optional_inputs=("sequence_ratio_mask", "weights"),
    finite=("logprobs", "advantages", "sequence_ratio_mask", "weights"),
)
def gspo_token(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 1 - 3e-4,
    clip_high_threshold: float = 1 + 4e-4,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-min(s * advantage, clip(s) * advantage), summed; s: the geometric mean of the sequence's ratios, eq. 14.

    The value of s is that of the whole sequence; its gradient goes to each token. sequence_ratio_mask: `[B, T]`, the
    tokens that s is the mean of and that count (default: those with a weight other than 0). The thresholds are bounds
    of s itself.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    ratio_mask = loss_fn_inputs.get("sequence_ratio_mask")
    if ratio_mask is not None:
        mask = torch.where(ratio_mask != 0, mask, 0.0)
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask)  # [B, T]
    advantages = counted(loss_fn_inputs["advantages"], mask)  # [B, T]
    counts = (mask != 0).float()
    mean = sequence_sum(log_ratio.detach(), counts) / counts.sum(-1).clamp(min=1)  # [B]
    ratio = (mean[:, None] + log_ratio - log_ratio.detach()).exp()  # [B, T]
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T]
    diagnostics = {
        "ratio:mean": masked_mean(ratio, mask),
        "kl:mean": masked_mean(-log_ratio, mask),
        "clip_fraction:mean": masked_mean((clipped * advantages < ratio * advantages).float(), mask),
    }
    return LossFnOutput(aggregate(-surrogate, mask, aggregation), logprobs, diagnostics)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [gspo_token]
