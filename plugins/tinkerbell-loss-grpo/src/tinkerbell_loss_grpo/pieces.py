"""Shared parts of the losses: the policy on sampled tokens, ratios, the clipped surrogate, and diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import (
    aggregate,
    aggregate_sequences,
    counted,
    effective_mask,
    masked_mean,
    sequence_mean,
    target_logprobs,
)

FURTHEST = 20.0
"""Log-ratios are clamped to plus or minus this: exp(89) is infinite in float32, and its gradient is NaN."""

Diagnostics = dict[str, Tensor]

policy_loss = family(
    coupling="sequence",
    inputs=("target_tokens", "logprobs", "advantages"),
    optional_inputs=("weights", "rollout_logprobs"),
    finite=("logprobs", "advantages", "weights", "rollout_logprobs"),
)
"""Declares a loss of a policy on sampled tokens."""

uncorrected_policy_loss = partial(
    policy_loss, optional_inputs=("weights",), finite=("logprobs", "advantages", "weights")
)
"""Declares a loss without a correction. `logprobs` may be those of the engine that sampled."""


class Policy(NamedTuple):
    """The policy on sampled tokens; all tensors are `[B, T]`, and 0 at positions that do not count.

    log_ratio: of the policy to the policy of the input `logprobs`. logprobs and log_ratio are attached to the graph.
    """

    mask: Tensor
    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor

    @property
    def summed_log_ratio(self) -> Tensor:
        """The log-ratio of each whole sequence, `[B, 1]`: the log of the ratios' product."""
        return self.log_ratio.sum(-1, keepdim=True).clamp(-FURTHEST, FURTHEST)

    def mean(self, x: Tensor) -> Tensor:
        """The unweighted mean of x `[B, T]` over the counted tokens of each sequence, `[B, 1]`; 0 for none."""
        return sequence_mean(x, (self.mask != 0).to(x.dtype))[:, None]

    def output(self, per_token: Tensor, aggregation: str, shown: Diagnostics) -> LossFnOutput:
        """The aggregated loss of per_token `[B, T]`."""
        return LossFnOutput(aggregate(per_token, self.mask, aggregation), self.logprobs, shown)

    def output_of_sequences(self, per_sequence: Tensor, aggregation: str, shown: Diagnostics) -> LossFnOutput:
        """The aggregated loss of per_sequence `[B, 1]`, over the sequences with a counted token."""
        counts = (self.mask != 0).any(-1)  # [B]
        return LossFnOutput(aggregate_sequences(per_sequence[:, 0], counts, aggregation), self.logprobs, shown)


def read_policy(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> Policy:
    """The policy at positions with `weights` times attention_mask other than 0."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask).clamp(-FURTHEST, FURTHEST)  # [B, T]
    return Policy(mask, logprobs, log_ratio, counted(loss_fn_inputs["advantages"], mask))


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """The value of `value` with the gradient of `gradient_of`."""
    return value.detach() + gradient_of - gradient_of.detach()


def clipped(
    policy: Policy, ratio: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Diagnostics]:
    """-min(ratio * A, clip(ratio, low, high) * A), at most -dual_clip * A if A < 0; and the diagnostics of it."""
    advantages = policy.advantages
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -surrogate, ratio_diagnostics(policy, ratio) | clip_diagnostics(policy, ratio, low, high)


def ratio_diagnostics(policy: Policy, ratio: Tensor) -> Diagnostics:
    """The distance of the policy from the policy that sampled, and the effective sample size."""
    return {
        "ratio:mean": masked_mean(ratio.expand_as(policy.mask), policy.mask),
        "kl:mean": masked_mean(-policy.log_ratio, policy.mask),
        "effective_sample_size:mean": effective_share(ratio.expand_as(policy.mask), policy.mask),
    }


def clip_diagnostics(policy: Policy, ratio: Tensor, low: float, high: float) -> Diagnostics:
    """The share of tokens without a gradient due to the clip: above high if A > 0, below low if A < 0."""
    above = (ratio > high) & (policy.advantages > 0)
    below = (ratio < low) & (policy.advantages < 0)
    return {
        "clip_fraction:mean": masked_mean((above | below).float(), policy.mask),
        "clip_high_fraction:mean": masked_mean(above.float(), policy.mask),
        "clip_low_fraction:mean": masked_mean(below.float(), policy.mask),
    }


def effective_share(weight: Tensor, mask: Tensor) -> Tensor:
    """The effective sample size of importance weights divided by the n counted tokens, from 1/n to 1; 0 for none."""
    kept = counted(weight.detach(), mask)
    n = (mask != 0).sum().clamp(min=1)
    return kept.sum().square() / (n * kept.square().sum()).clamp(min=1e-12)
