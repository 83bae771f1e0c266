"""Group sequence policy optimisation in its token form: one ratio a sequence, advantages a token (arXiv:2507.18071)."""

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

    In value s is of the whole sequence, in gradient of each token. sequence_ratio_mask `[B, T]`: which tokens it is the
    mean of, and which count (default: those of weight not 0). The thresholds are bounds of s itself.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    own = loss_fn_inputs.get("sequence_ratio_mask")
    if own is not None:
        mask = torch.where(own != 0, mask, 0.0)
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
