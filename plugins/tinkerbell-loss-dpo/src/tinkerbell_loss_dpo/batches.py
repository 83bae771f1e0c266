"""Alignment by optimal transport (AOT): compares the sorted rewards of a batch, so every pair depends on the others."""

from __future__ import annotations

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import pairs, preferred, sequence_sum
from tinkerbell_core.hyperparameters import SHARE
from tinkerbell_loss_dpo.pieces import Inputs, Pairs, on_batches_of_pairs, read


@on_batches_of_pairs(allowed={"label_smoothing": SHARE})
def aot(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (sorted model margins - sorted reference margins)): paired AOT (arXiv:2406.05882).

    A margin is log p(chosen) - log p(rejected). Only pairs with a counted token are sorted. label_smoothing: as in dpo.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = pairs(sequence_sum(found.logprobs, found.mask))  # [P]
    model = chosen - rejected
    return _output(found, model, model.detach() - found.margin.detach(), beta, label_smoothing, aggregation)


@on_batches_of_pairs(allowed={"label_smoothing": SHARE})
def aot_unpaired(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * (sorted chosen - sorted rejected)), of log-ratios: unpaired AOT (arXiv:2406.05882).

    The pairing of chosen and rejected completions has no effect. label_smoothing: as in dpo.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    return _output(found, found.chosen, found.rejected, beta, label_smoothing, aggregation)


def _output(
    found: Pairs, above: Tensor, below: Tensor, beta: float, label_smoothing: float, aggregation: str
) -> LossFnOutput:
    count = found.count
    violation = beta * (above[count].sort().values - below[count].sort().values)  # [pairs that count]
    per_rank = preferred(violation, label_smoothing)
    per_pair = above.new_zeros(above.shape).masked_scatter(count, per_rank)  # [P]
    return found.output(per_pair, beta, aggregation)
