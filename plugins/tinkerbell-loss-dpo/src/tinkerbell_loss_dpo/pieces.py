"""What the losses here are made of: the log-ratio of each completion to its reference, and a loss per pair made one."""

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
    inputs=("target_tokens", "ref_logprobs"),
    optional_inputs=("weights",),
    finite=("ref_logprobs", "weights"),
)
"""Declares a loss of pairs that do not see each other."""

on_batches_of_pairs = partial(on_pairs, coupling="batch")
"""Declares a loss in which every pair depends on the others."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of a chosen and a rejected completion, each with its log-ratio: log p(y) - log reference(y), summed.

    mask, logprobs: `[B, T]`, of all B = 2P rows. reference: as it came, `[B, T]` or `[B]`.
    """

    mask: Tensor
    logprobs: Tensor
    reference: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """By how much the chosen one gained more than the rejected one, `[P]`."""
        return self.chosen - self.rejected

    @property
    def count(self) -> Tensor:
        """Whether any token of a pair counts, `[P]`."""
        chosen, rejected = pairs((self.mask != 0).any(-1))
        return chosen | rejected

    def averaged(self) -> Pairs:
        """The same with each log-ratio divided by how many tokens count, so that length does not."""
        chosen, rejected = pairs((self.mask != 0).sum(-1).clamp(min=1))  # [P]
        return Pairs(self.mask, self.logprobs, self.reference, self.chosen / chosen, self.rejected / rejected)

    def output(self, per_pair: Tensor, beta: float, aggregation: str, plus: Tensor | None = None) -> LossFnOutput:
        """A loss `[P]` aggregated, `plus` a scalar; beta * log-ratio are shown as rewards."""
        loss = aggregate_sequences(per_pair, self.count, aggregation)
        shown = reward_diagnostics(beta * self.chosen, beta * self.rejected)
        return LossFnOutput(loss if plus is None else loss + plus, self.logprobs, shown)


def read(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Pairs:
    """The pairs of a batch. Raises BadData for an odd number of rows."""
    pairs(attention_mask)
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    return under(mask, logprobs, loss_fn_inputs["ref_logprobs"])


def under(mask: Tensor, logprobs: Tensor, reference: Tensor) -> Pairs:
    """The pairs these numbers make under a mask `[B, T]`."""
    chosen, rejected = pairs(sequence_log_ratio(logprobs, reference, mask))  # [P]
    return Pairs(mask, logprobs, reference, chosen, rejected)
