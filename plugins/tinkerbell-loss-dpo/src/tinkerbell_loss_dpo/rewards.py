"""Losses of the reward of each completion, beta * log-ratio, and not only of the difference of two rewards."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import preferred
from tinkerbell_core.hyperparameters import above
from tinkerbell_loss_dpo.pieces import Inputs, on_pairs, read


@on_pairs()
def nca(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(chosen) - (log sigmoid(-chosen) + log sigmoid(-rejected)) / 2, of rewards: NCA (2402.05369)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = beta * found.chosen, beta * found.rejected  # [P]
    per_pair = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return found.output(per_pair, beta, aggregation)


@on_pairs()
def bco_pair(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    reward_shift: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(chosen - shift) - log sigmoid(shift - rejected), of rewards: BCO on pairs (arXiv:2404.04656).

    reward_shift is the paper's delta: a running mean of the diagnostics `chosen_reward` and `rejected_reward`, which
    the caller computes. TRL and Liger have no shift, which equals 0.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = beta * found.chosen - reward_shift, beta * found.rejected - reward_shift  # [P]
    return found.output(-F.logsigmoid(chosen) - F.logsigmoid(-rejected), beta, aggregation)


@on_pairs(allowed={"beta": above(0)})
def sppo_hard(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2, of log-ratios: SPPO with hard labels (2405.00675).

    beta is 1 / eta of the paper.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    goal = 1 / (2 * beta)
    return found.output((found.chosen - goal).square() + (found.rejected + goal).square(), beta, aggregation)


@on_pairs(allowed={"beta": above(0)})
def cal_dpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(margin) + (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2, log-ratios: Cal-DPO (2412.14516).

    DPO with two terms that calibrate the log-ratios to +-1 / (2 beta); beta does not multiply the margin. The authors'
    code multiplies the squares by 0.5.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    goal = 1 / (2 * beta)
    calibration = (found.chosen - goal).square() + (found.rejected + goal).square()  # [P]
    return found.output(preferred(found.margin) + calibration, beta, aggregation)


@on_pairs()
def apo_zero(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """1 - sigmoid(chosen) + sigmoid(rejected), of rewards: APO-zero (arXiv:2408.06266).

    Use it if the chosen completions are better than those of the model; if they are worse, use apo_down. twinkle calls
    this loss kto_pair.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = beta * found.chosen, beta * found.rejected  # [P]
    return found.output((-chosen).sigmoid() + rejected.sigmoid(), beta, aggregation)


@on_pairs()
def apo_down(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """sigmoid(chosen) + 1 - sigmoid(chosen - rejected), of rewards: APO-down (2408.06266).

    Use it if the completions of the model are better than the chosen ones. It makes both completions less likely, the
    rejected one more than the chosen one.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, margin = beta * found.chosen, beta * found.margin  # [P]
    return found.output(chosen.sigmoid() + (-margin).sigmoid(), beta, aggregation)
