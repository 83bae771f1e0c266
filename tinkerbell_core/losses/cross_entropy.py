"""Weighted cross-entropy: supervised fine-tuning, and the carrier of losses computed by the client."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.functional import aggregate, effective_mask, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import hookimpl
from tinkerbell_core.spec import LossSpec


@loss(coupling="sequence", inputs=("target_tokens",), optional_inputs=("weights",), finite=("weights",))
def cross_entropy(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """-log p(target) times the weights (any sign, default 1), summed.

    target_tokens and weights are `[B, T]`, or `[B, T, K]` for K targets a position. A forward call gives the logprobs
    of every token; in training those of weight 0 are skipped, and given as 0.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T] or [B, T, K]
    # clients read log-probabilities by a forward call whose weights are all 0
    where = mask if model_outputs.requires_grad else attention_mask
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=where)
    return LossFnOutput(aggregate(-logprobs, mask, aggregation), logprobs)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [cross_entropy]
