"""Direct reward optimisation: a policy gradient with a quadratic penalty on the log-ratio (arXiv:2405.19107)."""

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
def dro(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-(log p * advantage - beta / 2 * log_ratio^2), summed. `beta` has no default: pass it in loss_fn_config.

    logprobs: of the sampler. advantages: `[B, T]`, or `[B]` with one value per sequence.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask)  # [B, T]
    advantages = counted(loss_fn_inputs["advantages"], mask)  # [B, T]
    per_token = -(counted(logprobs, mask) * advantages - 0.5 * beta * log_ratio.square())
    diagnostics = {
        "kl:mean": masked_mean(-log_ratio, mask),
        "log_ratio_squared:mean": masked_mean(log_ratio.square(), mask),
    }
    return LossFnOutput(aggregate(per_token, mask, aggregation), logprobs, diagnostics)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [dro]
