"""DPPO (arXiv:2602.04879): tokens leave the loss by a divergence between probabilities, not by a ratio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import aggregate, counted, masked_mean
from tinkerbell_loss_grpo.pieces import Policy, policy_loss, ratio_diagnostics, read_policy

_SMALL = 1e-8

UNCORRECTED: dict[str, Any] = {"optional_inputs": ("weights",), "finite": ("logprobs", "advantages", "weights")}
"""What these declare: logprobs are the engine's already."""  # Any: what loss() takes


def _probabilities(policy: Policy, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sampled tokens, `[B, T]`: under the policy, under the one that sampled."""
    return policy.logprobs.detach().exp(), counted(sampler, policy.mask).exp()


def binary_tv_mask(policy: Policy, sampler: Tensor, low: float, high: float) -> Tensor:
    """1 but where the policy has moved by more than low or high, the way the advantage points (eq. 13)."""
    now, then = _probabilities(policy, sampler)
    up = (policy.advantages > 0) & (now - then > high)
    down = (policy.advantages < 0) & (then - now > low)
    return (~(up | down)).to(now.dtype)


def binary_kl_mask(policy: Policy, sampler: Tensor, low: float, high: float) -> Tensor:
    """1 but where KL(sampler || policy) of "this token or another" is over low or high, the way A points (eq. 14)."""
    now, then = _probabilities(policy, sampler)
    kl = -then * policy.log_ratio.detach() + (1 - then) * ((1 - then + _SMALL) / (1 - now + _SMALL)).log()
    up = (policy.advantages > 0) & (now > then) & (kl > high)
    down = (policy.advantages < 0) & (now < then) & (kl > low)
    return (~(up | down)).to(now.dtype)


def _surrogate(policy: Policy, kept: Tensor, aggregation: str) -> LossFnOutput:
    ratio = policy.log_ratio.exp()
    per_token = -ratio * policy.advantages * kept
    diagnostics = ratio_diagnostics(policy, ratio) | {"clip_fraction:mean": masked_mean(1 - kept, policy.mask)}
    return LossFnOutput(aggregate(per_token, policy.mask, aggregation), policy.logprobs, diagnostics)


def _truncated(policy: Policy, kept: Tensor, cap: float, aggregation: str) -> LossFnOutput:
    ratio = policy.log_ratio.detach().exp()
    per_token = -ratio.clamp(max=cap) * policy.advantages * policy.logprobs * kept
    diagnostics = ratio_diagnostics(policy, ratio) | {
        "clip_fraction:mean": masked_mean(1 - kept, policy.mask),
        "truncated_fraction:mean": masked_mean((ratio > cap) * kept, policy.mask),
    }
    return LossFnOutput(aggregate(per_token, policy.mask, aggregation), policy.logprobs, diagnostics)


@policy_loss(**UNCORRECTED)
def dppo_tv(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * A where the token's probability has not moved by more than delta the way A points, else 0.

    logprobs: of the engine that sampled. SkyRL's `dppo`; verl's is dppo_tv_truncated, of the same gradient while no
    ratio is over its cap, but of another value.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_tv_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _surrogate(policy, kept, aggregation)


@policy_loss(**UNCORRECTED)
def dppo_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * A where the binary KL divergence from the sampler is within delta, or A points back; else 0.

    logprobs and peers as for dppo_tv.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_kl_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _surrogate(policy, kept, aggregation)


@policy_loss(**UNCORRECTED)
def dppo_tv_truncated(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    ratio_cap: float = 20.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio, cap), detached, * A * log p, on the tokens that dppo_tv keeps (section 5.4; verl's `dppo_tv`)."""
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_tv_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _truncated(policy, kept, ratio_cap, aggregation)


@policy_loss(**UNCORRECTED)
def dppo_kl_truncated(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    ratio_cap: float = 20.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio, cap), detached, * A * log p, on the tokens that dppo_kl keeps (section 5.4; verl's `dppo_kl`)."""
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_kl_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _truncated(policy, kept, ratio_cap, aggregation)
