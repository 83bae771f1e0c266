"""Terms to add to a policy loss: estimators of the KL divergence from the reference, and the entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import aggregate, counted, effective_mask, entropy, masked_mean, target_logprobs
from tinkerbell_core.hyperparameters import above
from tinkerbell_loss_grpo.pieces import FURTHEST, straight_through

penalty = family(
    coupling="sequence",
    inputs=("target_tokens", "ref_logprobs"),
    optional_inputs=("weights", "logprobs"),
    finite=("ref_logprobs", "weights", "logprobs"),
    allowed={"ratio_cap": above(0)},
)
"""Declares an estimator of the KL divergence from the reference. `logprobs` are those of the sampler, if it differs."""


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio^2 / 2: low variance; its expected gradient is that of the KL divergence."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio: unbiased and never negative."""
    log_ratio = log_ratio.clamp(min=-FURTHEST)
    return (-log_ratio).exp() - 1 + log_ratio


class Gap(NamedTuple):
    """The policy on sampled tokens: mask, log-probabilities and log-ratio to the reference, all `[B, T]`."""

    mask: Tensor
    logprobs: Tensor
    log_ratio: Tensor

    def unbiased(self, value: Tensor, sampler: Tensor | None, cap: float) -> Tensor:
        """`value` with the gradient of k2, times the ratio to the policy that sampled if `sampler` is given."""
        surrogate = k2(self.log_ratio)
        if sampler is not None:
            drift = counted(self.logprobs.detach() - sampler, self.mask).clamp(-FURTHEST, FURTHEST)
            surrogate = surrogate * drift.exp().clamp(max=cap)
        return straight_through(value, surrogate)

    def output(self, per_token: Tensor, aggregation: str) -> LossFnOutput:
        shown = {
            "ref_kl:mean": masked_mean(self.log_ratio, self.mask),
            "ref_kl_k3:mean": masked_mean(k3(self.log_ratio.detach()), self.mask),
        }
        return LossFnOutput(aggregate(per_token, self.mask, aggregation), self.logprobs, shown)


def read_gap(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> Gap:
    """The gap at positions with `weights` times attention_mask other than 0."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return Gap(mask, logprobs, counted(logprobs - loss_fn_inputs["ref_logprobs"], mask))


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

    Its expected gradient is 0, so use unbiased_gradient if it is a loss (verl's `k1+`, OpenRLHF's unbiased_gradient):
    the gradient is then that of k2, and with `logprobs`, of the policy that sampled, times the ratio, which is at most
    ratio_cap. Estimators: http://joschu.net/blog/kl-approx.html.
    """
    gap = read_gap(model_outputs, loss_fn_inputs, attention_mask)
    value = gap.log_ratio  # [B, T]
    if unbiased_gradient:
        value = gap.unbiased(value, loss_fn_inputs.get("logprobs"), ratio_cap)
    return gap.output(value, aggregation)


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
    """(log p - log p_ref)^2 / 2 of the sampled tokens, summed: a biased value with an unbiased gradient.

    unbiased_gradient: as for kl_k1; here it only adds the ratio to the policy that sampled.
    """
    gap = read_gap(model_outputs, loss_fn_inputs, attention_mask)
    value = k2(gap.log_ratio)  # [B, T]
    if unbiased_gradient:
        value = gap.unbiased(value, loss_fn_inputs.get("logprobs"), ratio_cap)
    return gap.output(value, aggregation)


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
    """p_ref / p - 1 - log(p_ref / p) of the sampled tokens, summed: unbiased, never negative, the term of GRPO.

    Its expected gradient is that of KL(reference || policy). unbiased_gradient: as for kl_k1 (verl's `k3+`). verl and
    OpenRLHF clamp it to at most 10.
    """
    gap = read_gap(model_outputs, loss_fn_inputs, attention_mask)
    value = k3(gap.log_ratio)  # [B, T]
    if unbiased_gradient:
        value = gap.unbiased(value, loss_fn_inputs.get("logprobs"), ratio_cap)
    return gap.output(value, aggregation)


@penalty(optional_inputs=("weights",), finite=("ref_logprobs", "weights"), allowed={})
def kl_abs(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """|log p - log p_ref| of the sampled tokens, summed; no estimator of a KL divergence; its gradient is bounded."""
    gap = read_gap(model_outputs, loss_fn_inputs, attention_mask)
    return gap.output(gap.log_ratio.abs(), aggregation)


@loss(coupling="sequence", inputs=(), optional_inputs=("weights",), finite=("weights",))
def entropy_bonus(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """-entropy of the next-token distribution at each position, summed: entropy bonus.

    Add it with a small weight to another loss. weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    entropies = entropy(model_outputs, where=mask)  # [B, T]
    return LossFnOutput(
        aggregate(-entropies, mask, aggregation), diagnostics={"entropy:mean": masked_mean(entropies, mask)}
    )
