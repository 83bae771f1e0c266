"""Process reward models: each step of a solution is right or wrong, and has its score at its last token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import aggregate, counted, effective_mask, masked_mean
from tinkerbell_loss_reward.pieces import Inputs, scores

on_steps = family(
    coupling="sequence",
    inputs=("step_labels", "weights"),
    finite=("step_labels", "weights"),
)
"""Declares a loss of steps. weights are not 0 at the last token of each step."""


@on_steps()
def prm(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    reward_token: int = 0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """Binary cross-entropy of sigmoid(score) and the label of each step: a process reward model (arXiv:2305.20050).

    The score is the logit of reward_token at the last token of the step. step_labels: `[B, T]`, from 0 to 1, such as
    the share of successful rollouts (arXiv:2312.08935). With one label at the end of each row, it trains an outcome
    reward model.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    return _output(scores(model_outputs, mask, reward_token), loss_fn_inputs, mask, aggregation)


@on_steps(example_hyperparameters={"good_token": 1, "bad_token": 2})
def prm_tokens(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    good_token: int,
    bad_token: int,
    aggregation: str = "sum",
) -> LossFnOutput:
    """Binary cross-entropy of softmax over two tokens and the label of each step: Math-Shepherd (arXiv:2312.08935).

    good_token and bad_token are token ids, for example those of "+" and "-". The logits of other tokens have no effect.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    score = scores(model_outputs, mask, good_token) - scores(model_outputs, mask, bad_token)
    return _output(score, loss_fn_inputs, mask, aggregation)


def _output(score: Tensor, loss_fn_inputs: Inputs, mask: Tensor, aggregation: str) -> LossFnOutput:
    labels = counted(loss_fn_inputs["step_labels"].to(score.dtype), mask)  # [B, T]
    per_step = F.binary_cross_entropy_with_logits(score, labels, reduction="none")
    right = (score > 0) == (labels > 0.5)
    diagnostics = {
        "step_accuracy:mean": masked_mean(right.float(), mask),
        "step_reward:mean": masked_mean(score.sigmoid(), mask),
    }
    return LossFnOutput(aggregate(per_step, mask, aggregation), None, diagnostics)
