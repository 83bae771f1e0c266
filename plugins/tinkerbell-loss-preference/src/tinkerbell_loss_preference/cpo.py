"""Contrastive preference optimisation (CPO): DPO without a reference, plus the likelihood of the chosen completions."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import preferred
from tinkerbell_core.hyperparameters import SHARE, above
from tinkerbell_loss_preference.pieces import Inputs, averaged, on_pairs, summed


@on_pairs(allowed={"label_smoothing": SHARE})
def cpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    likelihood_weight: float = 1.0,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))) + NLL(chosen): CPO (arXiv:2401.08417).

    The NLL is the mean over the tokens of a completion, as in the authors' code. The paper's formula sums it. Other
    projects take the mean over the tokens of the batch, which is aggregation="token-mean". label_smoothing is the share
    of flipped labels.
    """
    found = summed(model_outputs, loss_fn_inputs, attention_mask)
    margin = beta * found.margin  # [P]
    per_pair = preferred(margin, label_smoothing)
    return found.output(
        per_pair,
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=likelihood_weight,
    )


@on_pairs()
def cpo_hinge(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    likelihood_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """max(0, 1 - beta * (log p(chosen) - log p(rejected))) + NLL(chosen): SLiC's hinge (arXiv:2305.10425), in CPO."""
    found = summed(model_outputs, loss_fn_inputs, attention_mask)
    return found.output(
        torch.relu(1 - beta * found.margin),
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=likelihood_weight,
    )


@on_pairs(allowed={"beta": above(0)})
def cpo_ipo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    likelihood_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(mean log p(chosen) - mean log p(rejected) - 1 / (2 beta))^2 + NLL(chosen): IPO's square (2310.12036), in CPO."""
    found = averaged(model_outputs, loss_fn_inputs, attention_mask)
    return found.output(
        (found.margin - 1 / (2 * beta)).square(),
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=likelihood_weight,
    )
