"""Regression of scores: the values of a critic, clipped to those of the rollouts, and the squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import aggregate, counted, effective_mask, masked_mean
from tinkerbell_loss_reward.pieces import Inputs, scores


@loss(
    coupling="sequence",
    inputs=("old_values", "returns"),
    optional_inputs=("weights",),
    finite=("old_values", "returns", "weights"),
)
def value_clip(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    reward_token: int = 0,
    clip: float = 0.2,
    aggregation: str = "sum",
) -> LossFnOutput:
    """0.5 * max((v - R)^2, (clamp(v, old - clip, old + clip) - R)^2): PPO's clipped value loss (arXiv:1707.06347).

    A value is the logit of reward_token at its position. old_values and returns: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    values = scores(model_outputs, mask, reward_token)  # [B, T]
    old, returns = counted(loss_fn_inputs["old_values"], mask), counted(loss_fn_inputs["returns"], mask)
    clipped = values.clamp(old - clip, old + clip)
    free, held = (values - returns).square(), (clipped - returns).square()
    diagnostics = {
        "value:mean": masked_mean(values, mask),
        "value_error:mean": masked_mean(free, mask),
        "clip_fraction:mean": masked_mean((held > free).float(), mask),
    }
    return LossFnOutput(aggregate(0.5 * torch.maximum(free, held), mask, aggregation), None, diagnostics)


@loss(coupling="sequence", inputs=("labels",), optional_inputs=("weights",), finite=("labels", "weights"))
def mse(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    reward_token: int = 0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(score - label)^2: regression of scores.

    A score is the logit of reward_token. labels: `[B, T]`, used at positions with weights other than 0. For one score
    per row, set a weight only at the last token of each row.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    values = scores(model_outputs, mask, reward_token)  # [B, T]
    error = (values - counted(loss_fn_inputs["labels"], mask)).square()
    diagnostics = {"value:mean": masked_mean(values, mask), "value_error:mean": masked_mean(error, mask)}
    return LossFnOutput(aggregate(error, mask, aggregation), None, diagnostics)
