"""Shared parts of the losses: the log-probabilities of the pairs of a batch, and the aggregation of a loss per pair."""

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
    preferred_rows=(0,),
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    finite=("weights",),
)
"""Declares a loss of pairs: rows 2i are chosen, rows 2i + 1 rejected."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of completions. chosen, rejected: `[P]`, log-probabilities. likely: the rows of which the NLL is added.

    logprobs: `[B, T]`, of every row. mask: `[B, T]`. count: `[P]`, whether a pair has a counted token.
    """

    mask: Tensor
    logprobs: Tensor
    chosen: Tensor
    rejected: Tensor
    count: Tensor
    likely: slice

    @property
    def margin(self) -> Tensor:
        """The log-probability of the chosen completion minus that of the rejected one, `[P]`."""
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
        """The aggregated per_pair `[P]`, plus likelihood_weight times `likelihood`, by default the NLL of `likely`."""
        logprobs, mask = self.logprobs[self.likely], self.mask[self.likely]  # [P, T]
        loss = aggregate_sequences(per_pair, self.count, aggregation)
        if likelihood_weight:
            nll = sequence_nll(logprobs, mask, aggregation) if likelihood is None else likelihood
            loss = loss + likelihood_weight * nll
        shown = reward_diagnostics(*rewards) | {"nll": masked_mean(-logprobs, mask)}
        return LossFnOutput(loss, self.logprobs, shown)


def summed(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """Pairs of log-probabilities that are summed over tokens. Raises BadData if the number of rows is odd."""
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    return _paired(mask, logprobs, sequence_sum(logprobs, mask))


def averaged(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """Pairs of log-probabilities that are averaged over tokens, 0 for none. Raises BadData if the rows are odd."""
    mask, logprobs = score(model_outputs, loss_fn_inputs, attention_mask)
    return _paired(mask, logprobs, sequence_mean(logprobs, mask))


def score(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask, and the target log-probabilities at its counted positions, both `[B, T]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    return mask, target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)


def _paired(mask: Tensor, logprobs: Tensor, per_row: Tensor) -> Pairs:
    chosen, rejected = pairs(per_row)  # [P]
    some, other = pairs((mask != 0).any(-1))
    return Pairs(mask, logprobs, chosen, rejected, some | other, slice(0, None, 2))
