"""What the losses here are made of: each completion's reward and whether it was liked, and the loss they end in."""

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
    """B completions. logprobs: `[B, T]`. log_ratio: `[B]`, log p(y) - log reference(y), summed over tokens that count.

    liked, disliked: `[B]`, which of those with a token that counts; mismatched: those that only measure the KL.
    """

    logprobs: Tensor
    log_ratio: Tensor
    liked: Tensor
    disliked: Tensor
    mismatched: Tensor

    def output(
        self, if_liked: Tensor, if_disliked: Tensor, beta: float, aggregation: str, **diagnostics: Tensor
    ) -> LossFnOutput:
        """What a completion costs where it is liked and where it is not, both `[B]`, aggregated over the judged."""
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
    """The completions of a batch. `desirable` `[B]` is 1 for a liked one, 0 for another, -1 for a mismatched one."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = sequence_log_ratio(logprobs, loss_fn_inputs["ref_logprobs"], mask)  # [B]
    desirable = per_sequence("desirable", loss_fn_inputs["desirable"], mask).float()  # [B]
    counts = (mask != 0).any(-1)  # [B]
    mismatched = counts & (desirable < 0)
    liked = counts & (desirable > 0.5)
    return Judged(logprobs, log_ratio, liked, counts & ~liked & ~mismatched, mismatched)


def mean_over(x: Tensor, rows: Tensor) -> Tensor:
    """Mean of x `[B]` over some rows, 0 for none; a scalar without a graph."""
    return masked_mean(x[:, None], rows[:, None])
