"""Shared parts of the losses: log-ratios and judgements of a batch, and the aggregation of a loss per completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import (
    aggregate_sequences,
    effective_mask,
    masked_mean,
    per_sequence,
    sequence_log_ratio,
    target_logprobs,
)

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """B completions. logprobs: `[B, T]`. log_ratio: `[B]`, log p(y) - log reference(y), summed over counted tokens.

    liked, disliked, mismatched: `[B]`, True for the rows of each kind; False for a row without a counted token.
    """

    logprobs: Tensor
    log_ratio: Tensor
    liked: Tensor
    disliked: Tensor
    mismatched: Tensor

    def output(
        self, if_liked: Tensor, if_disliked: Tensor, beta: float, aggregation: str, **diagnostics: Tensor
    ) -> LossFnOutput:
        """The loss of liked and of disliked completions, both `[B]`, aggregated over the rows that are one of them."""
        per_row = torch.where(self.liked, if_liked, torch.where(self.disliked, if_disliked, 0.0))  # [B]
        reward = beta * self.log_ratio
        shown = {
            "desirable_reward": mean_over(reward, self.liked),
            "undesirable_reward": mean_over(reward, self.disliked),
            "desirable_fraction": mean_over(self.liked.float(), self.liked | self.disliked),
        }
        loss = aggregate_sequences(per_row, self.liked | self.disliked, aggregation)
        return LossFnOutput(loss, self.logprobs, {**shown, **diagnostics})


def read(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Judged:
    """The completions of a batch. desirable: `[B]`, 1 if liked, 0 if disliked, -1 if mismatched."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = sequence_log_ratio(logprobs, loss_fn_inputs["ref_logprobs"], mask)  # [B]
    desirable = per_sequence("desirable", loss_fn_inputs["desirable"], mask).float()  # [B]
    counts = (mask != 0).any(-1)  # [B]
    mismatched = counts & (desirable < 0)
    liked = counts & (desirable > 0.5)
    return Judged(logprobs, log_ratio, liked, counts & ~liked & ~mismatched, mismatched)


def mean_over(x: Tensor, rows: Tensor) -> Tensor:
    """The mean of x `[B]` over the marked rows, 0 for none; a scalar without a graph."""
    return masked_mean(x[:, None], rows[:, None])
