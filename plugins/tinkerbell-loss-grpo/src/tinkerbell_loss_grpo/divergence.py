"""DPPO (arXiv:2602.04879): masks tokens by a divergence between probabilities instead of clipping a ratio."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import counted, masked_mean
from tinkerbell_loss_grpo.pieces import Diagnostics, Policy, ratio_diagnostics, read_policy, uncorrected_policy_loss

_SMALL = 1e-8


def _probabilities(policy: Policy, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the sampled tokens, `[B, T]`: under the policy, and under the policy that sampled."""
    return policy.logprobs.detach().exp(), counted(sampler, policy.mask).exp()


def binary_tv_mask(policy: Policy, sampler: Tensor, low: float, high: float) -> Tensor:
    """0 if the probability has moved by more than low or high in the direction of the advantage, else 1 (eq. 13)."""
    now, then = _probabilities(policy, sampler)
    return _kept(policy, now - then > high, then - now > low)


def binary_kl_mask(policy: Policy, sampler: Tensor, low: float, high: float) -> Tensor:
    """As binary_tv_mask, with KL(sampler || policy) of the binary choice "this token or another" (eq. 14)."""
    now, then = _probabilities(policy, sampler)
    kl = -then * policy.log_ratio.detach() + (1 - then) * ((1 - then + _SMALL) / (1 - now + _SMALL)).log()
    return _kept(policy, (now > then) & (kl > high), (now < then) & (kl > low))


def _kept(policy: Policy, up: Tensor, down: Tensor) -> Tensor:
    """0 if the probability is too far up and A > 0, or too far down and A < 0; else 1. up, down: bool `[B, T]`."""
    masked = ((policy.advantages > 0) & up) | ((policy.advantages < 0) & down)
    return (~masked).to(policy.advantages.dtype)


def _surrogate(policy: Policy, kept: Tensor, aggregation: str) -> LossFnOutput:
    ratio = policy.log_ratio.exp()
    return policy.output(-ratio * policy.advantages * kept, aggregation, _shown(policy, ratio, kept))


def _truncated(policy: Policy, kept: Tensor, cap: float, aggregation: str) -> LossFnOutput:
    ratio = policy.log_ratio.detach().exp()
    per_token = -ratio.clamp(max=cap) * policy.advantages * policy.logprobs * kept
    truncated = {"truncated_fraction:mean": masked_mean((ratio > cap) * kept, policy.mask)}
    return policy.output(per_token, aggregation, _shown(policy, ratio, kept) | truncated)


def _shown(policy: Policy, ratio: Tensor, kept: Tensor) -> Diagnostics:
    return ratio_diagnostics(policy, ratio) | {"clip_fraction:mean": masked_mean(1 - kept, policy.mask)}


@uncorrected_policy_loss()
def dppo_tv(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * A if the token's probability has moved by at most delta in the direction of A, else 0.

    DPPO (arXiv:2602.04879), SkyRL's `dppo`. logprobs: of the engine that sampled. verl's version is dppo_tv_truncated:
    its gradient is the same if no ratio is above the cap, but its value differs.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_tv_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _surrogate(policy, kept, aggregation)


@uncorrected_policy_loss()
def dppo_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * A if the binary KL from the sampler is at most delta or A points back to the sampler, else 0.

    DPPO (arXiv:2602.04879). logprobs: of the engine that sampled. The versions of SkyRL and verl: as for dppo_tv.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_kl_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _surrogate(policy, kept, aggregation)


@uncorrected_policy_loss()
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
    """-min(ratio, cap), detached, * A * log p, on the tokens that dppo_tv keeps.

    DPPO (arXiv:2602.04879, section 5.4), verl's `dppo_tv`. logprobs: of the engine that sampled.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_tv_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _truncated(policy, kept, ratio_cap, aggregation)


@uncorrected_policy_loss()
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
    """-min(ratio, cap), detached, * A * log p, on the tokens that dppo_kl keeps.

    DPPO (arXiv:2602.04879, section 5.4), verl's `dppo_kl`. logprobs: of the engine that sampled.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    kept = binary_kl_mask(policy, loss_fn_inputs["logprobs"], delta_low, delta_high)
    return _truncated(policy, kept, ratio_cap, aggregation)
