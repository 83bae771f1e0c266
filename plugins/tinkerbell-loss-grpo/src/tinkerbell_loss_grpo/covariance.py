"""Losses that hold back the few tokens whose log-probability and advantage rise together, which cost entropy most.

The entropy mechanism of reinforcement learning (arXiv:2505.22617).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import masked_mean
from tinkerbell_core.hyperparameters import SHARE
from tinkerbell_loss_grpo.pieces import (
    Policy,
    clip_diagnostics,
    ratio_diagnostics,
    read_policy,
    uncorrected_policy_loss,
)


def _covariance(policy: Policy) -> Tensor:
    """(A - mean A) * (log p - mean log p) of each token that counts, the means over the batch's; detached, `[B, T]`."""
    logprobs = policy.logprobs.detach()
    advantages = policy.advantages
    return (advantages - masked_mean(advantages, policy.mask)) * (logprobs - masked_mean(logprobs, policy.mask))


@uncorrected_policy_loss(coupling="batch", allowed={"share": SHARE})
def clip_cov(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    share: float = 2e-4,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A), but 0 for a few tokens drawn from those of high covariance.

    share: of all tokens, how many are drawn, at least 1; with 1.0 all whose covariance is between the bounds, and
    nothing is random. Tokens the clip has stopped already are not drawn. Inputs as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = policy.log_ratio.exp()
    whole = -ratio * policy.advantages
    clipped = -ratio.clamp(clip_low_threshold, clip_high_threshold) * policy.advantages
    covariance = _covariance(policy)
    candidates = (
        (policy.mask != 0) & (clipped <= whole) & (covariance > covariance_low) & (covariance < covariance_high)
    )
    number = (share * (policy.mask != 0).sum()).long().clamp(min=1)
    rank = torch.where(candidates, torch.rand_like(covariance), 2.0).flatten().argsort().argsort().view_as(covariance)
    drawn = candidates & (rank < number)
    per_token = torch.where(drawn, 0.0, torch.maximum(whole, clipped))
    diagnostics = (
        ratio_diagnostics(policy, ratio)
        | clip_diagnostics(policy, ratio, clip_low_threshold, clip_high_threshold)
        | {"held_back:mean": masked_mean(drawn.float(), policy.mask)}
    )
    return policy.output(per_token, aggregation, diagnostics)


@uncorrected_policy_loss(coupling="batch", allowed={"share": SHARE})
def kl_cov(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    share: float = 2e-4,
    kl_coef: float = 1.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-ratio * A, plus kl_coef * |log-ratio| for the few tokens of highest covariance.

    share: of all tokens, how many pay, at least 1: 2e-4 in the paper and verl, 0.2 in SkyRL. Inputs as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = policy.log_ratio.exp()
    counts = policy.mask != 0
    number = (share * counts.sum()).long().clamp(min=1)
    covariance = torch.where(counts, _covariance(policy), -torch.inf)
    rank = covariance.flatten().argsort(descending=True, stable=True).argsort().view_as(covariance)
    pays = counts & (rank < number)
    per_token = -ratio * policy.advantages + torch.where(pays, kl_coef * policy.log_ratio.abs(), 0.0)
    diagnostics = ratio_diagnostics(policy, ratio) | {"held_back:mean": masked_mean(pays.float(), policy.mask)}
    return policy.output(per_token, aggregation, diagnostics)
