"""What policy losses are made of: the policy read once, ratios, the clipped surrogate, what people watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinkerbell_core import LossSpec, loss
from tinkerbell_core.functional import counted, effective_mask, masked_mean, target_logprobs
from tinkerbell_core.spec import LossFn

FURTHEST = 20.0
"""Log-ratios are held within this of 0: exp(89) is infinite in float32, and its gradient NaN."""

Diagnostics = dict[str, Tensor]


def policy_loss(**different: Any) -> Callable[[LossFn], LossSpec]:  # Any: what loss() takes
    """Declares a loss of a policy on sampled tokens, like @loss, with `different` over what these have in common."""
    common = {
        "coupling": "sequence",
        "inputs": ("target_tokens", "logprobs", "advantages"),
        "optional_inputs": ("weights", "rollout_logprobs"),
        "finite": ("logprobs", "advantages", "weights", "rollout_logprobs"),
    }
    return loss(**{**common, **different})


class Policy(NamedTuple):
    """The policy on sampled tokens, as every policy loss reads it; all `[B, T]` and 0 where nothing counts.

    log_ratio: of the policy to the one in `logprobs`. logprobs and log_ratio are attached to the graph.
    """

    mask: Tensor
    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor


def read_policy(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> Policy:
    """The policy where `weights` times attention_mask is not 0."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask).clamp(-FURTHEST, FURTHEST)  # [B, T]
    return Policy(mask, logprobs, log_ratio, counted(loss_fn_inputs["advantages"], mask))


def mean_log_ratio(policy: Policy) -> Tensor:
    """The log-ratio of each sequence per token that counts, `[B, 1]`: the log of the ratios' geometric mean."""
    keep = policy.mask != 0
    return policy.log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)


def summed_log_ratio(policy: Policy) -> Tensor:
    """The log-ratio of each whole sequence, `[B, 1]`: the log of the ratios' product."""
    return policy.log_ratio.sum(-1, keepdim=True).clamp(-FURTHEST, FURTHEST)


def sequence_advantages(policy: Policy) -> Tensor:
    """One advantage a sequence, `[B, 1]`: the mean over the tokens that count."""
    keep = policy.mask != 0
    return policy.advantages.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)


def sequence_mask(policy: Policy) -> Tensor:
    """1 for a sequence in which anything counts, `[B, 1]`: the mask of a loss that has one number a sequence."""
    return (policy.mask != 0).any(-1, keepdim=True).to(policy.logprobs.dtype)


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """The number `value`, with the gradient of another expression."""
    return value.detach() + gradient_of - gradient_of.detach()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> Tensor:
    """min(ratio * A, clip(ratio, low, high) * A), and where A < 0 not below dual_clip * A."""
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is None:
        return surrogate
    return torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)


def ratio_diagnostics(policy: Policy, ratio: Tensor) -> Diagnostics:
    """How far the policy is from the one that sampled, and which share of the tokens the ratios leave."""
    return {
        "ratio:mean": masked_mean(ratio.expand_as(policy.mask), policy.mask),
        "kl:mean": masked_mean(-policy.log_ratio, policy.mask),
        "effective_sample_size:mean": effective_share(ratio.expand_as(policy.mask), policy.mask),
    }


def clip_diagnostics(policy: Policy, ratio: Tensor, low: float, high: float) -> Diagnostics:
    """The share of tokens whose gradient the clip takes: above where the advantage is positive, below where not."""
    above = (ratio > high) & (policy.advantages > 0)
    below = (ratio < low) & (policy.advantages < 0)
    return {
        "clip_fraction:mean": masked_mean((above | below).float(), policy.mask),
        "clip_high_fraction:mean": masked_mean(above.float(), policy.mask),
        "clip_low_fraction:mean": masked_mean(below.float(), policy.mask),
    }


def effective_share(weight: Tensor, mask: Tensor) -> Tensor:
    """Effective sample size of importance weights as a share of the tokens that count, from 1/n to 1; 0 for none."""
    kept = counted(weight.detach(), mask)
    n = (mask != 0).sum().clamp(min=1)
    return kept.sum().square() / (n * kept.square().sum()).clamp(min=1e-12)
