"""Penalties to add to a policy loss: estimators of the KL divergence to a reference, and the entropy bonus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tinkerbell_core import LossFnOutput, LossSpec, loss
from tinkerbell_core.functional import aggregate, counted, effective_mask, entropy, masked_mean, target_logprobs
from tinkerbell_core.spec import LossFn
from tinkerbell_loss_grpo.pieces import FURTHEST, Diagnostics, straight_through


def penalty(**different: Any) -> Callable[[LossFn], LossSpec]:  # Any: what loss() takes
    """Declares a penalty against a reference, like @loss, with `different` over what these have in common."""
    common = {
        "coupling": "sequence",
        "inputs": ("target_tokens", "ref_logprobs"),
        "optional_inputs": ("weights", "logprobs"),
        "finite": ("ref_logprobs", "weights", "logprobs"),
    }
    return loss(**{**common, **different})


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio^2 / 2: low variance, and the one whose gradient is that of the KL divergence in expectation."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio: unbiased and never negative."""
    log_ratio = log_ratio.clamp(min=-FURTHEST)
    return (-log_ratio).exp() - 1 + log_ratio


def _read(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, log-probabilities and log-ratio to the reference, all `[B, T]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return mask, logprobs, counted(logprobs - loss_fn_inputs["ref_logprobs"], mask)


def _diagnostics(mask: Tensor, log_ratio: Tensor) -> Diagnostics:
    return {"ref_kl:mean": masked_mean(log_ratio, mask), "ref_kl_k3:mean": masked_mean(k3(log_ratio.detach()), mask)}


def _unbiased(value: Tensor, log_ratio: Tensor, logprobs: Tensor, inputs: Mapping[str, Tensor], cap: float) -> Tensor:
    """`value` with the gradient of k2, weighted by the ratio to the policy that sampled where `logprobs` are given."""
    surrogate = k2(log_ratio)
    sampler = inputs.get("logprobs")
    if sampler is not None:
        drift = (logprobs.detach() - sampler).clamp(-FURTHEST, FURTHEST)
        surrogate = surrogate * drift.exp().clamp(max=cap)
    return straight_through(value, surrogate)


@penalty()
def kl_k1(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    unbiased_gradient: bool = False,
    ratio_cap: float = 10.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """log p - log p_ref of the sampled tokens, summed: unbiased for KL(policy || reference), of high variance.

    Its own gradient is 0 in expectation: as a loss it wants unbiased_gradient (the gradient of k2; verl's `k1+`,
    OpenRLHF's unbiased_gradient), where `logprobs`, of the policy that sampled, weigh each token by the ratio, at most
    ratio_cap. Estimators: http://joschu.net/blog/kl-approx.html.
    """
    mask, logprobs, log_ratio = _read(model_outputs, loss_fn_inputs, attention_mask)
    value = log_ratio
    if unbiased_gradient:
        value = _unbiased(value, log_ratio, logprobs, loss_fn_inputs, ratio_cap)
    return LossFnOutput(aggregate(value, mask, aggregation), logprobs, _diagnostics(mask, log_ratio))


@penalty()
def kl_k2(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    unbiased_gradient: bool = False,
    ratio_cap: float = 10.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """(log p - log p_ref)^2 / 2 of the sampled tokens, summed: biased as a number, right as a gradient.

    unbiased_gradient: as for kl_k1, it adds the weights only.
    """
    mask, logprobs, log_ratio = _read(model_outputs, loss_fn_inputs, attention_mask)
    value = k2(log_ratio)
    if unbiased_gradient:
        value = _unbiased(value, log_ratio, logprobs, loss_fn_inputs, ratio_cap)
    return LossFnOutput(aggregate(value, mask, aggregation), logprobs, _diagnostics(mask, log_ratio))


@penalty()
def kl_k3(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    unbiased_gradient: bool = False,
    ratio_cap: float = 10.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """p_ref / p - 1 - log(p_ref / p) of the sampled tokens, summed: unbiased, never negative, what GRPO adds.

    Its own gradient is that of KL(reference || policy) in expectation; unbiased_gradient as for kl_k1 (verl's `k3+`).
    verl and OpenRLHF hold it below 10.
    """
    mask, logprobs, log_ratio = _read(model_outputs, loss_fn_inputs, attention_mask)
    value = k3(log_ratio)
    if unbiased_gradient:
        value = _unbiased(value, log_ratio, logprobs, loss_fn_inputs, ratio_cap)
    return LossFnOutput(aggregate(value, mask, aggregation), logprobs, _diagnostics(mask, log_ratio))


@penalty(optional_inputs=("weights",), finite=("ref_logprobs", "weights"))
def kl_abs(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """|log p - log p_ref| of the sampled tokens, summed; no estimator of a KL divergence, but bounded in gradient."""
    mask, logprobs, log_ratio = _read(model_outputs, loss_fn_inputs, attention_mask)
    return LossFnOutput(aggregate(log_ratio.abs(), mask, aggregation), logprobs, _diagnostics(mask, log_ratio))


@loss(coupling="sequence", inputs=(), optional_inputs=("weights",), finite=("weights",))
def entropy_bonus(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """-entropy of the next-token distribution at each position, summed: to be added, with a small weight, to a loss."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    entropies = entropy(model_outputs, where=mask)  # [B, T]
    return LossFnOutput(
        aggregate(-entropies, mask, aggregation), diagnostics={"entropy:mean": masked_mean(entropies, mask)}
    )
