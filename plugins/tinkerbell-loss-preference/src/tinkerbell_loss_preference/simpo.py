"""Simple preference optimisation (SimPO): the reward is the mean log-probability, and the target margin is gamma."""

from __future__ import annotations

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import preferred
from tinkerbell_core.hyperparameters import SHARE
from tinkerbell_loss_preference.pieces import Inputs, averaged, on_pairs

_LARGEST = 80.0
"""The largest exponent: exp(80) is finite in float32. A larger exponent is clamped, so it has no gradient."""


@on_pairs(allowed={"label_smoothing": SHARE})
def simpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    likelihood_weight: float = 0.0,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma): SimPO (arXiv:2405.14734).

    The authors recommend to start with beta 2 to 2.5 and gamma / beta 0.5. A likelihood_weight above 0 adds the NLL of
    the chosen completions, which is CPO-SimPO; Liger's SimPO adds it by default. In TRL, gamma is 0.5, beta 0.1.
    """
    found = averaged(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin - gamma  # [P]
    per_pair = preferred(margin, label_smoothing)
    return found.output(
        per_pair,
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=likelihood_weight,
    )


@on_pairs(allowed={"label_smoothing": SHARE})
def alphapo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    likelihood_weight: float = 0.0,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (r(chosen) - r(rejected)) - gamma), r = (1 - p^-alpha) / alpha: AlphaPO (arXiv:2501.03884).

    p is exp of the mean log-probability of a completion's tokens. With alpha 0 it is SimPO.
    """
    found = averaged(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = beta * _alpha(found.chosen, alpha), beta * _alpha(found.rejected, alpha)  # [P]
    margin = chosen - rejected - gamma
    per_pair = preferred(margin, label_smoothing)
    return found.output(per_pair, aggregation, rewards=(chosen, rejected), likelihood_weight=likelihood_weight)


def _alpha(logprob: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return logprob
    return -(-alpha * logprob).clamp(max=_LARGEST).expm1() / alpha
