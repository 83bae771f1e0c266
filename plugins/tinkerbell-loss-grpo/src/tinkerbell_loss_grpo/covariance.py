"""Losses that restrain tokens with a high covariance of log-probability and advantage, which lower the entropy most.

"The entropy mechanism of reinforcement learning" (arXiv:2505.22617).
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
    """(A - mean A) * (log p - mean log p) of each token, detached, `[B, T]`; the means are over the counted tokens."""
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
    """-min(ratio * A, clip(ratio) * A), but 0 for a few random tokens of high covariance (arXiv:2505.22617).

    share: the number of drawn tokens as a share of all tokens; at least one is drawn. With a share of 1, all tokens
    with a covariance between the bounds are drawn, which is not random. Tokens that the clip affects are not drawn.
    Inputs: as for grpo.
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
    """-ratio * A, plus kl_coef * |log-ratio| for the few tokens of highest covariance (arXiv:2505.22617).

    share: the number of penalised tokens as a share of all tokens, at least one token; 2e-4 in the paper and verl, 0.2
    in SkyRL. Inputs: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = policy.log_ratio.exp()
    counts = policy.mask != 0
    number = (share * counts.sum()).long().clamp(min=1)
    covariance = torch.where(counts, _covariance(policy), -torch.inf)
    rank = covariance.flatten().argsort(descending=True, stable=True).argsort().view_as(covariance)
    penalised = counts & (rank < number)
    per_token = -ratio * policy.advantages + torch.where(penalised, kl_coef * policy.log_ratio.abs(), 0.0)
    diagnostics = ratio_diagnostics(policy, ratio) | {"held_back:mean": masked_mean(penalised.float(), policy.mask)}
    return policy.output(per_token, aggregation, diagnostics)
