"""Losses that look at a response as a whole: one ratio a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import aggregate, masked_mean
from tinkerbell_loss_grpo.corrections import corrected
from tinkerbell_loss_grpo.pieces import (
    FURTHEST,
    Policy,
    clip_diagnostics,
    clipped_surrogate,
    mean_log_ratio,
    policy_loss,
    ratio_diagnostics,
    read_policy,
    sequence_advantages,
    sequence_mask,
    straight_through,
    summed_log_ratio,
)


def _sequence_ratio_on_tokens(policy: Policy) -> Tensor:
    """GSPO's ratio, `[B, T]`: in value the geometric mean of the sequence, in gradient each token's own."""
    return straight_through(mean_log_ratio(policy), policy.logprobs).clamp(max=FURTHEST).exp()


@policy_loss()
def gspo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 1 - 3e-4,
    clip_high_threshold: float = 1 + 4e-4,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-mean",
) -> LossFnOutput:
    """-min(s * A, clip(s) * A), s the geometric mean of a response's ratios; the mean over responses.

    Group sequence policy optimisation in its token form (arXiv:2507.18071, eq. 14), so that advantages may be `[B]` or
    `[B, T]`. The same as TRL's, Liger's and OpenRLHF's sequence form wherever an advantage is one a sequence.
    logprobs `[B, T]`; dual_clip and correction as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = _sequence_ratio_on_tokens(policy)
    low, high = clip_low_threshold, clip_high_threshold
    per_token = -clipped_surrogate(ratio, policy.advantages, low, high, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    diagnostics = ratio_diagnostics(policy, ratio) | clip_diagnostics(policy, ratio, low, high) | more
    return LossFnOutput(aggregate(per_token, policy.mask, aggregation), policy.logprobs, diagnostics)


@policy_loss()
def luspo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-min(s * A, clip(s) * A) times the response's length, s as in gspo; the mean over responses.

    Length-unbiased sequence policy optimisation. TRL's and Liger's `luspo` take the ratio of each token unless told
    importance_sampling_level="sequence": that is grpo with aggregation="seq-mean-token-sum"; Liger's, so, has no mask.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = _sequence_ratio_on_tokens(policy)
    low, high = clip_low_threshold, clip_high_threshold
    per_token = -clipped_surrogate(ratio, policy.advantages, low, high, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    diagnostics = ratio_diagnostics(policy, ratio) | clip_diagnostics(policy, ratio, low, high) | more
    return LossFnOutput(aggregate(per_token, policy.mask, aggregation), policy.logprobs, diagnostics)


@policy_loss(optional_inputs=("weights",), finite=("logprobs", "advantages", "weights"))
def rloo_ppo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-min(s * A, clip(s) * A), s the product of a response's ratios; the mean over responses.

    The whole response is one action (RLOO, arXiv:2402.14740, as TRL trains it). advantages: `[B]`, rewards less the
    mean of the group's others; of `[B, T]` the mean over the response is taken. logprobs: `[B, T]`.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = summed_log_ratio(policy).exp()  # [B, 1]
    low, high = clip_low_threshold, clip_high_threshold
    per_sequence = -clipped_surrogate(ratio, sequence_advantages(policy), low, high)  # [B, 1]
    diagnostics = ratio_diagnostics(policy, ratio) | clip_diagnostics(policy, ratio, low, high)
    return LossFnOutput(aggregate(per_sequence, sequence_mask(policy), aggregation), policy.logprobs, diagnostics)


@policy_loss(optional_inputs=("weights",), finite=("logprobs", "advantages", "weights"))
def gmpo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    log_clip_low: float = 0.4,
    log_clip_high: float = 0.4,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-A * geometric mean of a response's ratios, each clipped where it pays; the mean over responses.

    Geometric-mean policy optimisation (arXiv:2507.20673): log-ratios are held within [-log_clip_low, log_clip_high] on
    the side the advantage points to. advantages: `[B]`; of `[B, T]` the mean over the response is taken. logprobs:
    `[B, T]`.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    clipped = policy.log_ratio.clamp(-log_clip_low, log_clip_high)
    advantage = sequence_advantages(policy)  # [B, 1]
    pays = torch.where(
        advantage > 0, torch.minimum(policy.log_ratio, clipped), torch.maximum(policy.log_ratio, clipped)
    )
    ratio = mean_log_ratio(policy._replace(log_ratio=pays)).exp()  # [B, 1]
    diagnostics = ratio_diagnostics(policy, ratio) | clip_diagnostics(
        policy, policy.log_ratio.exp(), math.exp(-log_clip_low), math.exp(log_clip_high)
    )
    return LossFnOutput(aggregate(-advantage * ratio, sequence_mask(policy), aggregation), policy.logprobs, diagnostics)


@policy_loss(optional_inputs=("weights",), finite=("logprobs", "advantages", "weights"))
def vespo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-phi(w) * A * log p, phi(w) = w^k e^(lambda (1 - w)) detached, w the product of a response's ratios.

    A gamma-shaped weight, 1 at w = 1 and falling to both sides, for a clip; k and lambda by the advantage's sign.
    As TRL and Liger have it; w is held within [1e-8, e^20]. To correct for the engine that sampled, give its
    log-probabilities as `logprobs`: w then holds the whole drift.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    with torch.no_grad():
        log_w = policy.log_ratio.sum(-1, keepdim=True).clamp(math.log(1e-8), FURTHEST)  # [B, 1]
        k = torch.where(policy.advantages >= 0, k_positive, k_negative)  # [B, T]
        rate = torch.where(policy.advantages >= 0, lambda_positive, lambda_negative)  # [B, T]
        phi = (rate + k * log_w - rate * log_w.exp()).exp()  # [B, T]
    per_token = -phi * policy.advantages * policy.logprobs
    diagnostics = ratio_diagnostics(policy, log_w.exp()) | {"phi:mean": masked_mean(phi, policy.mask)}
    return LossFnOutput(aggregate(per_token, policy.mask, aggregation), policy.logprobs, diagnostics)
