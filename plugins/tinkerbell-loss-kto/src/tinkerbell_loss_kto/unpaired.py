"""Losses of single judged completions that need no estimate of the KL."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import per_sequence
from tinkerbell_loss_kto.pieces import Inputs, read


@loss(
    coupling="sequence",
    inputs=("target_tokens", "ref_logprobs", "desirable"),
    optional_inputs=("weights",),
    finite=("ref_logprobs", "desirable", "weights"),
)
def apo_zero_unpaired(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """1 - sigmoid(reward) if liked, sigmoid(reward) if not, reward = beta * log-ratio: APO-zero (2408.06266).

    desirable: `[B]`, 1 for a liked completion, 0 for a disliked one.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    reward = beta * found.log_ratio  # [B]
    return found.output(
        desirable_weight * (-reward).sigmoid(), undesirable_weight * reward.sigmoid(), beta, aggregation
    )


@loss(
    coupling="sequence",
    inputs=("target_tokens", "ref_logprobs", "desirable"),
    optional_inputs=("weights", "density_ratio"),
    finite=("ref_logprobs", "desirable", "density_ratio", "weights"),
)
def bco(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    reward_shift: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(+-(reward - shift)), + if liked, - if not, reward = beta * log-ratio: BCO (arXiv:2404.04656).

    desirable: `[B]`, 1 for a liked completion, 0 for a disliked one. reward_shift is the paper's delta: a running mean
    of the diagnostics `desirable_reward` and `undesirable_reward`, which the caller computes. density_ratio: `[B]`, the
    weights of disliked rows, the likelihood of the prompt among liked rows divided by that among disliked rows.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    reward = beta * found.log_ratio - reward_shift  # [B]
    ratio = loss_fn_inputs.get("density_ratio")
    disliked = -F.logsigmoid(-reward)
    if ratio is not None:
        disliked = per_sequence("density_ratio", ratio, found.logprobs) * disliked
    return found.output(-F.logsigmoid(reward), disliked, beta, aggregation)
