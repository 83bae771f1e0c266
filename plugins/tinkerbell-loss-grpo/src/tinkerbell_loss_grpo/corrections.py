"""Corrections (TIS, MIS and others) for an engine that sampled with other probabilities than those of the trainer.

A correction is a factor of the loss of each token. It is computed from `rollout_logprobs` (of the engine) and
`logprobs` (of the trainer at that time). It does not change the number of tokens that a mean divides by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData, BadHyperparameter, did_you_mean
from tinkerbell_core.functional import counted, masked_mean
from tinkerbell_loss_grpo.pieces import FURTHEST, Diagnostics, Policy, effective_share


class Drift(NamedTuple):
    """Log-probabilities of trainer and engine, `[B, T]`, 0 at positions that do not count."""

    policy: Policy
    trainer: Tensor
    engine: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return (self.trainer - self.engine).clamp(-FURTHEST, FURTHEST)


def token_ratio(drift: Drift) -> Tensor:
    """The ratio of each token, `[B, T]`."""
    return drift.log_ratio.exp()


def sequence_ratio(drift: Drift) -> Tensor:
    """The product of the tokens' ratios, `[B, 1]`."""
    return drift.log_ratio.sum(-1, keepdim=True).clamp(-FURTHEST, FURTHEST).exp()


def geometric_ratio(drift: Drift) -> Tensor:
    """The geometric mean of the tokens' ratios, `[B, 1]`."""
    return drift.policy.mean(drift.log_ratio).exp()


def binary_kl(drift: Drift) -> Tensor:
    """KL(engine || trainer) of "this token or another", `[B, T]`."""
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (drift.engine, drift.trainer))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def binary_tv(drift: Drift) -> Tensor:
    """Total variation of "this token or another", `[B, T]`."""
    return (drift.engine.exp() - drift.trainer.exp()).abs()


def inside(statistic: Tensor, low: float, high: float) -> Tensor:
    """1 if low <= statistic <= high, else 0."""
    return ((statistic >= low) & (statistic <= high)).to(statistic.dtype)


def off_policy_sequence(drift: Drift, low: float, high: float) -> Tensor:
    """OPSM (arXiv:2512.02556): drops a token if A < 0 and the mean KL of its sequence is greater than high."""
    left = drift.policy.mean(drift.engine - drift.policy.logprobs.detach())  # [B, 1]
    return ((drift.policy.advantages >= 0) | (left <= high)).to(left.dtype)


CORRECTIONS: Mapping[str, Callable[[Drift, float, float], Tensor]] = {
    # truncated importance sampling: the ratio, clamped to the bounds
    "truncate-token": lambda d, low, high: token_ratio(d).clamp(low, high),
    "truncate-sequence": lambda d, low, high: sequence_ratio(d).clamp(low, high),
    # masked importance sampling: the ratio, or 0 outside the bounds
    "mask-token": lambda d, low, high: token_ratio(d) * inside(token_ratio(d), low, high),
    "mask-sequence": lambda d, low, high: sequence_ratio(d) * inside(sequence_ratio(d), low, high),
    "mask-geometric": lambda d, low, high: token_ratio(d) * inside(geometric_ratio(d), low, high),
    "mask-token-kl": lambda d, low, high: token_ratio(d) * inside(binary_kl(d), low, high),
    "mask-sequence-kl": lambda d, low, high: token_ratio(d) * inside(d.policy.mean(binary_kl(d)), low, high),
    "mask-token-tv": lambda d, low, high: token_ratio(d) * inside(binary_tv(d), low, high),
    "mask-sequence-tv": lambda d, low, high: token_ratio(d) * inside(d.policy.mean(binary_tv(d)), low, high),
    # rejection: 0 outside the bounds, else 1
    "reject-token": lambda d, low, high: inside(token_ratio(d), low, high),
    "reject-sequence": lambda d, low, high: inside(sequence_ratio(d), low, high),
    "reject-geometric": lambda d, low, high: inside(geometric_ratio(d), low, high),
    "off-policy-sequence": off_policy_sequence,
}
"""Name → the factor of drift, lower bound and upper bound."""


def corrected(
    per_token: Tensor, policy: Policy, loss_fn_inputs: Mapping[str, Tensor], name: str, low: float, high: float
) -> tuple[Tensor, Diagnostics]:
    """per_token `[B, T]` times the named correction ("none" changes nothing), and the diagnostics of the correction.

    Raises BadHyperparameter for an unknown name, and BadData if there are no rollout_logprobs.
    """
    if name == "none":
        return per_token, {}
    if name not in CORRECTIONS:
        raise BadHyperparameter(
            f"no correction {name!r}{did_you_mean(name, CORRECTIONS)} (available: none, {', '.join(CORRECTIONS)})"
        )
    engine = loss_fn_inputs.get("rollout_logprobs")
    if engine is None:
        raise BadData(f"correction={name!r} needs rollout_logprobs, the log-probabilities from the engine that sampled")
    trainer, engine = (counted(x, policy.mask) for x in (loss_fn_inputs["logprobs"], engine))
    with torch.no_grad():
        factor = CORRECTIONS[name](Drift(policy, trainer, engine), low, high).expand_as(policy.mask)
    diagnostics = {
        "correction:mean": masked_mean(factor, policy.mask),
        "corrected_away:mean": masked_mean((factor == 0).float(), policy.mask),
        "correction_sample_size:mean": effective_share(factor, policy.mask),
    }
    return per_token * factor, diagnostics
