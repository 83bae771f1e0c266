"""Policy gradients of log p, and a regression of the log-ratio on advantages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import (
    aggregate_sequences,
    effective_mask,
    masked_mean,
    sequence_log_ratio,
    target_logprobs,
)
from tinkerbell_loss_grpo.corrections import corrected
from tinkerbell_loss_grpo.pieces import policy_loss, ratio_diagnostics, read_policy, uncorrected_policy_loss


@policy_loss()
def reinforce(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-log p * A, summed over each response; the mean over responses (Williams 1992).

    With aggregation="token-mean" it is GPG (arXiv:2504.02546). logprobs are only used for diagnostics and the
    correction. Inputs and correction: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token = -policy.logprobs * policy.advantages
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    diagnostics = ratio_diagnostics(policy, policy.log_ratio.exp()) | more
    return policy.output(per_token, aggregation, diagnostics)


# few random log-probabilities have a ratio within the default bounds
@uncorrected_policy_loss(example_hyperparameters={"clip_low_threshold": 1e-3, "clip_high_threshold": 1e3})
def rollout_is(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-ratio, detached, * A * log p if clip_low_threshold < ratio < clip_high_threshold, else 0 (arXiv:2602.15763).

    IcePop's double-sided calibration. It drops a token outside the bounds; cispo clips the weight of such a token.
    logprobs: of the engine that sampled (SkyRL's rollout_logprobs).
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = policy.log_ratio.detach().exp()
    within = (ratio > clip_low_threshold) & (ratio < clip_high_threshold)
    per_token = -torch.where(within, ratio, 0.0) * policy.advantages * policy.logprobs
    diagnostics = ratio_diagnostics(policy, ratio) | {"clip_fraction:mean": masked_mean((~within).float(), policy.mask)}
    return policy.output(per_token, aggregation, diagnostics)


@loss(
    coupling="sequence",
    inputs=("target_tokens", "ref_logprobs", "rewards", "optimal_values"),
    optional_inputs=("weights",),
    finite=("ref_logprobs", "rewards", "optimal_values", "weights"),
)
def a2po(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """(beta * log-ratio to the reference - (reward - V*))^2, the mean over responses (A*-PO, arXiv:2505.20686).

    rewards: `[B]`. optimal_values: `[B]`, V* of the prompt, which the caller estimates from samples of the reference.
    ref_logprobs: `[B, T]`, or `[B]` if they are summed.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    implicit = beta * sequence_log_ratio(logprobs, loss_fn_inputs["ref_logprobs"], mask)  # [B]
    optimal = loss_fn_inputs["rewards"] - loss_fn_inputs["optimal_values"]  # [B]
    counts = (mask != 0).any(-1)  # [B]
    diagnostics = {
        "implicit_reward:mean": masked_mean(implicit[:, None], counts[:, None]),
        "optimal_advantage:mean": masked_mean(optimal[:, None], counts[:, None]),
    }
    return LossFnOutput(aggregate_sequences((implicit - optimal).square(), counts, aggregation), logprobs, diagnostics)
