"""What the losses here are made of: each completion's log-probability, summed or averaged, and the loss they end in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import (
    aggregate_sequences,
    effective_mask,
    masked_mean,
    pairs,
    reward_diagnostics,
    sequence_mean,
    sequence_nll,
    sequence_sum,
    target_logprobs,
)

Inputs = Mapping[str, Tensor]

on_pairs = family(
    coupling="sequence",
    group_size=2,
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    finite=("weights",),
)
"""Declares a loss of rows 2i, chosen, and 2i + 1, rejected."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of completions. chosen, rejected: `[P]`, log-probabilities. likely: rows whose likelihood rises.

    logprobs: `[B, T]` of every row. mask: `[B, T]`. count: `[P]`, whether any token of a pair counts.
    """

    mask: Tensor
    logprobs: Tensor
    chosen: Tensor
    rejected: Tensor
    count: Tensor
    likely: slice

    @property
    def margin(self) -> Tensor:
        """How much likelier the chosen one is, `[P]`, a logarithm."""
        return self.chosen - self.rejected

    def output(
        self,
        per_pair: Tensor,
        aggregation: str,
        *,
        rewards: tuple[Tensor, Tensor],
        likelihood_weight: float,
        likelihood: Tensor | None = None,
    ) -> LossFnOutput:
        """A loss `[P]` aggregated, and likelihood_weight times the NLL of the likely rows, or `likelihood`."""
        logprobs, mask = self.logprobs[self.likely], self.mask[self.likely]  # [P, T]
        loss = aggregate_sequences(per_pair, self.count, aggregation)
        if likelihood_weight:
            nll = sequence_nll(logprobs, mask, aggregation) if likelihood is None else likelihood
            loss = loss + likelihood_weight * nll
        shown = reward_diagnostics(*rewards) | {"nll": masked_mean(-logprobs, mask)}
        return LossFnOutput(loss, self.logprobs, shown)


def summed(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """Pairs of log-probabilities summed over tokens. Raises BadData for an odd number of rows."""
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    return _paired(mask, logprobs, sequence_sum(logprobs, mask))


def averaged(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """Pairs of log-probabilities averaged over tokens, or 0. Raises BadData for an odd number of rows."""
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    return _paired(mask, logprobs, sequence_mean(logprobs, mask))


def score(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask and the target log-probabilities under it, both `[B, T]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    return mask, target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)


def _paired(mask: Tensor, logprobs: Tensor, per_row: Tensor) -> Pairs:
    chosen, rejected = pairs(per_row)  # [P]
    some, other = pairs((mask != 0).any(-1))
    return Pairs(mask, logprobs, chosen, rejected, some | other, slice(0, None, 2))
