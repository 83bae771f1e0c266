"""Triple preference optimisation (TPO): a preference loss of a pair, plus the likelihood of a gold completion."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import preferred, sequence_mean, sequence_sum
from tinkerbell_core.hyperparameters import SHARE
from tinkerbell_loss_preference.pieces import Inputs, Pairs, on_pairs, score

on_triples = partial(on_pairs, group_size=3, preferred_rows=(0, 2), allowed={"label_smoothing": SHARE})
"""Declares a loss of triples: rows 3i are chosen, rows 3i + 1 rejected, rows 3i + 2 gold."""


@on_triples()
def tpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.01,
    likelihood_weight: float = 1.0,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))) + NLL(gold): TPO (arXiv:2405.16681).

    Each triple is three consecutive rows: chosen, rejected, gold. Without the gold rows it is cpo with
    likelihood_weight 0. Raises BadData if the number of rows is not a multiple of 3.
    """
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    found = _tripled(mask, logprobs, sequence_sum(logprobs, mask))
    return _output(found, beta, beta * found.margin, likelihood_weight, label_smoothing, aggregation)


@on_triples()
def tpo_l(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    likelihood_weight: float = 1.0,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma) + NLL(gold): TPO-L (arXiv:2405.16681).

    Each triple is three consecutive rows: chosen, rejected, gold. Without the gold rows it is simpo. Raises BadData if
    the number of rows is not a multiple of 3.
    """
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    found = _tripled(mask, logprobs, sequence_mean(logprobs, mask))
    return _output(found, beta, beta * found.margin - gamma, likelihood_weight, label_smoothing, aggregation)


def _tripled(mask: Tensor, logprobs: Tensor, per_row: Tensor) -> Pairs:
    if len(mask) % 3:
        raise BadData(
            f"{len(mask)} rows, but a batch of triples has a multiple of 3: chosen, rejected, gold, chosen, ..."
        )
    count = (mask != 0).any(-1).view(-1, 3)[:, :2].any(-1)  # [P]
    return Pairs(mask, logprobs, per_row[0::3], per_row[1::3], count, slice(2, None, 3))


def _output(
    found: Pairs, beta: float, margin: Tensor, likelihood_weight: float, label_smoothing: float, aggregation: str
) -> LossFnOutput:
    per_pair = preferred(margin, label_smoothing)  # [P]
    return found.output(
        per_pair,
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=likelihood_weight,
    )
