"""Importance-weighted policy gradient (REINFORCE with off-policy correction)."""

from __future__ import annotations

from collections.abc import Mapping

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
def importance_sampling(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * advantage, summed; ratio = p / p_sampler, not clamped.

    logprobs: of the sampler. advantages: `[B, T]`, or `[B]` with one value per sequence.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask)  # [B, T]
    advantages = counted(loss_fn_inputs["advantages"], mask)  # [B, T]
    ratio = log_ratio.exp()
    diagnostics = {"ratio:mean": masked_mean(ratio, mask), "kl:mean": masked_mean(-log_ratio, mask)}
    return LossFnOutput(aggregate(-ratio * advantages, mask, aggregation), logprobs, diagnostics)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [importance_sampling]
