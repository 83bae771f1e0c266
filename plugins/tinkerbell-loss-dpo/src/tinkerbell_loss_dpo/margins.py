"""Losses of the margin: the log-ratio of the chosen completion minus the log-ratio of the rejected one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import preferred
from tinkerbell_core.hyperparameters import SHARE, Range, above
from tinkerbell_loss_dpo.pieces import Inputs, on_pairs, read


@on_pairs(allowed={"label_smoothing": SHARE})
def dpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * margin): direct preference optimisation (arXiv:2305.18290).

    The margin is the log-ratio of the chosen row to the reference minus that of the rejected row, each summed over the
    counted tokens. label_smoothing is the share of flipped labels (cDPO, ericmitchell.ai/cdpo.pdf). TRL and Liger
    ignore label_smoothing.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin  # [P]
    return found.output(preferred(margin, label_smoothing), beta, aggregation)


@on_pairs(allowed={"label_smoothing": SHARE})
def dpo_norm(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * margin) of log-ratios averaged over tokens: length-normalised DPO (arXiv:2411.15124)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask).averaged()
    margin = beta * found.margin  # [P]
    return found.output(preferred(margin, label_smoothing), beta, aggregation)


@on_pairs(allowed={"label_smoothing": Range(0, 0.5, high_open=True)})
def robust_dpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(-(1 - e) log sigmoid(u) + e log sigmoid(-u)) / (1 - 2e), u = beta * margin: robust DPO (2403.00409).

    An unbiased estimate of the DPO loss if a share e of the labels is flipped. label_smoothing is e, less than 0.5.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin  # [P]
    per_pair = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return found.output(per_pair / (1 - 2 * label_smoothing), beta, aggregation)


@on_pairs()
def dpo_hinge(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """max(0, 1 - beta * margin): the hinge of SLiC on DPO's margin, as in RSO (arXiv:2309.06657)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return found.output(torch.relu(1 - beta * found.margin), beta, aggregation)


@on_pairs(allowed={"beta": above(0)})
def ipo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(margin - 1 / (2 beta))^2: identity preference optimisation, IPO (arXiv:2310.12036).

    beta is the paper's tau. Log-ratios are summed, as in the paper and in OpenRLHF. TRL averages them over tokens,
    which is ipo_norm. twinkle multiplies the margin by beta before the square, which equals beta^2 times this loss with
    its beta set to beta^2.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return found.output((found.margin - 1 / (2 * beta)).square(), beta, aggregation)


@on_pairs(allowed={"beta": above(0)})
def ipo_norm(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(margin - 1 / (2 beta))^2 of log-ratios averaged over tokens: IPO (arXiv:2310.12036) as TRL computes it."""
    found = read(model_outputs, loss_fn_inputs, attention_mask).averaged()
    return found.output((found.margin - 1 / (2 * beta)).square(), beta, aggregation)


@on_pairs(allowed={"label_smoothing": Range(0, 1, low_open=True, high_open=True)})
def exo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    aggregation: str = "sum",
) -> LossFnOutput:
    """KL(sigmoid(beta * margin) || 1 - e), of two outcomes: efficient exact optimisation of pairs (arXiv:2402.00856).

    label_smoothing is e, between 0 and 1.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin  # [P]
    right = margin.sigmoid() * (F.logsigmoid(margin) - math.log(1 - label_smoothing))
    wrong = (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return found.output(right + wrong, beta, aggregation)


@on_pairs(allowed={"tau": above(0)})
def discopop(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(1 - g) * -log sigmoid(u) + g * exp(-u), u = beta * margin, g = sigmoid(u / tau): DiscoPOP (arXiv:2406.08414).

    An automated search found this loss, and it is not convex. At a margin of 0, which is the start of training, its
    gradient decreases the margin.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin  # [P]
    gate = (margin / tau).sigmoid()
    # g * exp(-u) in logarithms: exp(-u) alone overflows if u is far below 0
    exponential = (F.logsigmoid(margin / tau) - margin).exp()
    return found.output(-F.logsigmoid(margin) * (1 - gate) + exponential, beta, aggregation)


@on_pairs()
def dpop(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (margin - penalty * max(0, -chosen log-ratio))): DPO-positive, Smaug (arXiv:2402.13228)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * (found.margin - penalty * torch.relu(-found.chosen))  # [P]
    return found.output(-F.logsigmoid(margin), beta, aggregation)
