"""Proximal policy optimisation, the clipped surrogate (arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.functional import aggregate, counted, effective_mask, masked_mean, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import hookimpl
from tinkerbell_core.spec import LossSpec


@loss(
    coupling="sequence",
    inputs=("target_tokens", "logprobs", "advantages"),
    optional_inputs=("weights",),
    finite=("logprobs", "advantages", "weights"),
)
def ppo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-min(ratio * advantage, clip(ratio) * advantage), summed. The thresholds are bounds of the ratio itself.

    logprobs: of the sampler. advantages: `[B, T]`, or `[B]` with one value per sequence.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask)  # [B, T]
    advantages = counted(loss_fn_inputs["advantages"], mask)  # [B, T]
    ratio = log_ratio.exp()
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
    return [ppo]
