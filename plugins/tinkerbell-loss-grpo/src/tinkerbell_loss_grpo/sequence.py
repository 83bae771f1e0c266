"""Losses with one ratio per response."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import masked_mean
from tinkerbell_loss_grpo.corrections import corrected
from tinkerbell_loss_grpo.pieces import (
    FURTHEST,
    Policy,
    clip_diagnostics,
    clipped,
    policy_loss,
    ratio_diagnostics,
    read_policy,
    straight_through,
    uncorrected_policy_loss,
)


def _sequence_ratio_on_tokens(policy: Policy) -> Tensor:
    """The ratio of GSPO, `[B, T]`: its value is the geometric mean of the sequence, its gradient that of each token."""
    return straight_through(policy.mean(policy.log_ratio), policy.logprobs).clamp(max=FURTHEST).exp()


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

    Group sequence policy optimisation in its token form (arXiv:2507.18071, eq. 14), so advantages may be `[B]` or
    `[B, T]`. With one advantage per sequence, it equals the sequence form of TRL, Liger and OpenRLHF. logprobs:
    `[B, T]`. dual_clip and correction: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = _sequence_ratio_on_tokens(policy)
    per_token, shown = clipped(policy, ratio, clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token, aggregation, shown | more)


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

    Length-unbiased sequence policy optimisation. TRL's and Liger's `luspo` use the ratio of each token, which is grpo
    with aggregation="seq-mean-token-sum", unless importance_sampling_level="sequence". With the ratio of each token,
    Liger's version has no mask.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = _sequence_ratio_on_tokens(policy)
    per_token, shown = clipped(policy, ratio, clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token, aggregation, shown | more)


@uncorrected_policy_loss()
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

    The whole response is one action (RLOO, arXiv:2402.14740, as in TRL). advantages: `[B]`, the reward minus the mean
    reward of the other responses of the group; `[B, T]` are averaged over the response. logprobs: `[B, T]`.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    responses = policy._replace(advantages=policy.mean(policy.advantages))  # [B, 1]
    ratio = policy.summed_log_ratio.exp()  # [B, 1]
    per_sequence, shown = clipped(responses, ratio, clip_low_threshold, clip_high_threshold)  # [B, 1]
    return policy.output_of_sequences(per_sequence, aggregation, shown)


@uncorrected_policy_loss()
def gmpo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    log_clip_low: float = 0.4,
    log_clip_high: float = 0.4,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-A * geometric mean of a response's ratios, clipped in the direction of A; the mean over responses.

    Geometric-mean policy optimisation (arXiv:2507.20673): log-ratios are at most log_clip_high if A > 0, and at least
    -log_clip_low otherwise. advantages: `[B]`; `[B, T]` are averaged over the response. logprobs: `[B, T]`.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    clipped = policy.log_ratio.clamp(-log_clip_low, log_clip_high)
    advantage = policy.mean(policy.advantages)  # [B, 1]
    limited = torch.where(
        advantage > 0, torch.minimum(policy.log_ratio, clipped), torch.maximum(policy.log_ratio, clipped)
    )
    ratio = policy.mean(limited).exp()  # [B, 1]
    diagnostics = ratio_diagnostics(policy, ratio) | clip_diagnostics(
        policy, policy.log_ratio.exp(), math.exp(-log_clip_low), math.exp(log_clip_high)
    )
    return policy.output_of_sequences(-advantage * ratio, aggregation, diagnostics)


@uncorrected_policy_loss()
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

    The weight phi replaces a clip: it is 1 at w = 1, and has the shape of a gamma density, with its maximum at
    w = k / lambda. k and lambda depend on the sign of A. As in TRL and Liger, w is clamped to [1e-8, e^20]. To correct
    for the engine that sampled, send its log-probabilities as `logprobs`, so that w is the ratio to the engine.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    with torch.no_grad():
        log_w = policy.log_ratio.sum(-1, keepdim=True).clamp(math.log(1e-8), FURTHEST)  # [B, 1]
        k = torch.where(policy.advantages >= 0, k_positive, k_negative)  # [B, T]
        rate = torch.where(policy.advantages >= 0, lambda_positive, lambda_negative)  # [B, T]
        phi = (rate + k * log_w - rate * log_w.exp()).exp()  # [B, T]
    per_token = -phi * policy.advantages * policy.logprobs
    diagnostics = ratio_diagnostics(policy, log_w.exp()) | {"phi:mean": masked_mean(phi, policy.mask)}
    return policy.output(per_token, aggregation, diagnostics)
