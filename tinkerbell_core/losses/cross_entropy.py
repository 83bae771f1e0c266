"""Weighted cross-entropy: for supervised fine-tuning, and for losses that the client computes."""

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

    target_tokens and weights: `[B, T]`, or `[B, T, K]` for K targets per position. A forward call returns the logprobs
    of every token; a training call skips tokens of weight 0 and returns 0 for them.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T] or [B, T, K]
    # clients get log-probabilities from a forward call in which all weights are 0
    where = mask if model_outputs.requires_grad else attention_mask
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=where)
    return LossFnOutput(aggregate(-logprobs, mask, aggregation), logprobs)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [cross_entropy]
