"""Shared parts of the losses: the log-ratios of the pairs of a batch, and the aggregation of a loss per pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import (
    aggregate_sequences,
    effective_mask,
    pairs,
    reward_diagnostics,
    sequence_log_ratio,
    target_logprobs,
)

Inputs = Mapping[str, Tensor]

on_pairs = family(
    coupling="sequence",
    group_size=2,
    preferred_rows=(0,),
    inputs=("target_tokens", "ref_logprobs"),
    optional_inputs=("weights",),
    finite=("ref_logprobs", "weights"),
)
"""Declares a loss in which each pair is independent of the others."""

on_batches_of_pairs = partial(on_pairs, coupling="batch")
"""Declares a loss in which every pair depends on the others."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of a chosen and a rejected completion.

    mask, logprobs: `[B, T]`, of all B = 2P rows. reference: the input ref_logprobs, `[B, T]` or `[B]`. chosen and
    rejected: `[P]`, the log-ratios log p(y) - log reference(y), summed over tokens.
    """

    mask: Tensor
    logprobs: Tensor
    reference: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """The chosen log-ratio minus the rejected one, `[P]`."""
        return self.chosen - self.rejected

    @property
    def count(self) -> Tensor:
        """Whether a pair has a counted token, `[P]`."""
        chosen, rejected = pairs((self.mask != 0).any(-1))
        return chosen | rejected

    def averaged(self) -> Pairs:
        """The same pairs, with each log-ratio divided by the number of counted tokens."""
        chosen, rejected = pairs((self.mask != 0).sum(-1).clamp(min=1))  # [P]
        return Pairs(self.mask, self.logprobs, self.reference, self.chosen / chosen, self.rejected / rejected)

    def output(self, per_pair: Tensor, beta: float, aggregation: str, plus: Tensor | None = None) -> LossFnOutput:
        """The aggregated loss of per_pair `[P]`, plus `plus`, a scalar. Reward diagnostics: beta * log-ratio."""
        loss = aggregate_sequences(per_pair, self.count, aggregation)
        shown = reward_diagnostics(beta * self.chosen, beta * self.rejected)
        return LossFnOutput(loss if plus is None else loss + plus, self.logprobs, shown)


def read(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """The pairs of a batch. Raises BadData if the number of rows is odd."""
    pairs(attention_mask)
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    return under(mask, logprobs, loss_fn_inputs["ref_logprobs"])


def under(mask: Tensor, logprobs: Tensor, reference: Tensor) -> Pairs:
    """The pairs with log-ratios that are summed with a mask `[B, T]`."""
    chosen, rejected = pairs(sequence_log_ratio(logprobs, reference, mask))  # [P]
    return Pairs(mask, logprobs, reference, chosen, rejected)
