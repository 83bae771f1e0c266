"""DPO with divergences from the reference other than the reverse KL (f-DPO, arXiv:2309.16240)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_loss_dpo.pieces import Inputs, Pairs, on_pairs, read

_LARGEST = 80.0
"""The largest exponent: exp(80) is finite in float32. A larger exponent is clamped, so it has no gradient."""


@on_pairs()
def dpo_forward_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (f'(chosen) - f'(rejected))), f'(u) = 1 - 1 / u: f-DPO, forward KL (2309.16240)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return _output(found, lambda log_ratio: _alpha(log_ratio, 1.0), beta, aggregation)


@on_pairs()
def dpo_js(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (f'(chosen) - f'(rejected))), f'(u) = log(2u / (1 + u)): f-DPO, JS (2309.16240)."""
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return _output(found, lambda log_ratio: math.log(2) + F.logsigmoid(log_ratio), beta, aggregation)


@on_pairs()
def dpo_alpha(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (f'(chosen) - f'(rejected))), f'(u) = (1 - u^-alpha) / alpha (2309.16240).

    f-DPO with an alpha-divergence: alpha 0 is DPO, alpha 1 is dpo_forward_kl. TRL's f_alpha_divergence_coef is
    1 - alpha.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return _output(found, lambda log_ratio: _alpha(log_ratio, alpha), beta, aggregation)


def _alpha(log_ratio: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return log_ratio
    return -(-alpha * log_ratio).clamp(max=_LARGEST).expm1() / alpha


def _output(found: Pairs, derivative: Callable[[Tensor], Tensor], beta: float, aggregation: str) -> LossFnOutput:
    scored = Pairs(
        found.mask, found.logprobs, found.reference, derivative(found.chosen), derivative(found.rejected)
    )  # the reward diagnostics are those of f'
    return scored.output(-F.logsigmoid(beta * scored.margin), beta, aggregation)
