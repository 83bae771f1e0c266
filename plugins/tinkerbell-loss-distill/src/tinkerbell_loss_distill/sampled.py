"""On-policy distillation from one number per token: the teacher's log-probability of the sampled token."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import aggregate, counted, effective_mask, masked_mean, target_logprobs
from tinkerbell_core.hyperparameters import above

on_samples = family(
    coupling="sequence",
    inputs=("target_tokens", "teacher_logprobs", "logprobs"),
    optional_inputs=("weights",),
    finite=("teacher_logprobs", "logprobs", "weights"),
)
"""Declares a loss of the log-probabilities of sampled tokens."""


@on_samples()
def on_policy_distillation(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    coef: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio * coef * (log p_teacher - log p_sampler), summed: importance sampling, the advantage from the teacher.

    The loss of Tinker's cookbook (thinkingmachines.ai/blog/on-policy-distillation). target_tokens: tokens sampled from
    the student. logprobs: `[B, T]`, their log-probabilities at the time of sampling. teacher_logprobs: `[B, T]`, their
    log-probabilities under the teacher.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    log_ratio = counted(logprobs - loss_fn_inputs["logprobs"], mask).clamp(-20, 20)
    advantages = coef * counted(loss_fn_inputs["teacher_logprobs"] - loss_fn_inputs["logprobs"], mask)  # [B, T]
    diagnostics = {
        "teacher_kl:mean": masked_mean(-advantages / coef if coef else advantages, mask),
        "ratio:mean": masked_mean(log_ratio.exp(), mask),
        "kl:mean": masked_mean(-log_ratio, mask),
    }
    return LossFnOutput(aggregate(-log_ratio.exp() * advantages, mask, aggregation), logprobs, diagnostics)


@on_samples(inputs=("target_tokens", "teacher_logprobs"), finite=("teacher_logprobs", "weights"))
def sampled_reverse_kl(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """(log p - log p_teacher), detached, * log p, summed: the gradient of reverse_kl, estimated from the samples.

    TRL's SDFT and SDPO in the mode sampled_token. The samples must be from the current policy; for older samples, use
    on_policy_distillation. target_tokens and teacher_logprobs: `[B, T]`. The value of the loss is not a measure of
    progress; use the diagnostic teacher_kl.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    excess = counted(logprobs.detach() - loss_fn_inputs["teacher_logprobs"], mask)  # [B, T]
    diagnostics = {"teacher_kl:mean": masked_mean(excess, mask)}
    return LossFnOutput(aggregate(excess * logprobs, mask, aggregation), logprobs, diagnostics)


@on_samples(allowed={"temperature": above(0)})
def iw_opd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    gamma: float = 0.5,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-w * (log p_teacher - log p_sampler) * log p, summed; w decreases from 1 + gamma to 1 along each response.

    Position-weighted on-policy distillation (arXiv:2606.22600): w is 1 + gamma * (1 - the share of the response's
    disagreement before the token). The disagreement of a token is |log p_teacher - log p_sampler|. temperature: that of
    the sampling. The inputs are those of on_policy_distillation.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    outputs = model_outputs if temperature == 1.0 else model_outputs / temperature
    logprobs = target_logprobs(outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    advantages = counted(loss_fn_inputs["teacher_logprobs"] - loss_fn_inputs["logprobs"], mask)  # [B, T]
    disagreement = advantages.abs()
    before = disagreement.cumsum(-1) - disagreement
    share = before / disagreement.sum(-1, keepdim=True).clamp(min=1e-8)  # [B, T]
    weight = 1 + gamma * (1 - share)
    diagnostics = {
        "teacher_kl:mean": masked_mean(-advantages, mask),
        "position_weight:mean": masked_mean(weight, mask),
    }
    return LossFnOutput(aggregate(-weight * advantages * logprobs, mask, aggregation), logprobs, diagnostics)
