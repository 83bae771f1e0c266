"""Weighted cross-entropy: supervised fine-tuning, and the carrier of losses computed by the client."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinkerbell_core.functional import aggregate, effective_mask, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import hookimpl
from tinkerbell_core.spec import LossSpec, loss


@loss(coupling="sequence", inputs=("target_tokens",), optional_inputs=("weights",), finite=("weights",))
def cross_entropy(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    all_logprobs: bool = False,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log p(target) times the weights (any sign, default 1), summed.

    target_tokens and weights are `[B, T]`, or `[B, T, K]` for K targets a position. all_logprobs: give back those of
    targets of weight 0 too, which cost as much as the others; else they are 0.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T] or [B, T, K]
    logprobs = target_logprobs(
        model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask if all_logprobs else mask
    )
    return LossFnOutput(aggregate(-logprobs, mask, aggregation), logprobs)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [cross_entropy]
