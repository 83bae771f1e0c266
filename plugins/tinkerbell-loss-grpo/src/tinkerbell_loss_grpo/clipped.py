"""The clipped surrogate of PPO for groups of samples; most losses differ only in how it is averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import aggregate, counted, entropy, masked_mean
from tinkerbell_core.hyperparameters import SHARE, at_least
from tinkerbell_loss_grpo.corrections import corrected
from tinkerbell_loss_grpo.penalties import k3
from tinkerbell_loss_grpo.pieces import clipped, policy_loss, read_policy


@policy_loss()
def grpo(
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
    aggregation: str = "seq-mean-token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A), the mean over each response, then over responses.

    Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300) without its KL term; grpo_kl has it. advantages:
    `[B]`, one per response (the reward minus the mean of the group, divided by its standard deviation), or `[B, T]`.
    logprobs: `[B, T]`, of the policy that sampled. dual_clip: if A < 0, the loss is at most -dual_clip * A
    (arXiv:1912.09729). verl always uses it, with 3; TRL calls it delta. correction: the name of a factor that is
    computed from rollout_logprobs, see corrections.py.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token, aggregation, shown | more)


@policy_loss()
def bnpo(
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
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A), the mean over the tokens of this call.

    GRPO normalised by the number of tokens in the batch; TRL's and Liger's `bnpo`. Other inputs and hyperparameters: as
    for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token, aggregation, shown | more)


@policy_loss()
def dapo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.28,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A) with a higher upper clip, the mean over all tokens (arXiv:2503.14476).

    The mean is over the tokens of this call. For the mean over all calls of a step, use aggregation="sum" and
    optim_step(normalize="tokens"). TRL's and Liger's `dapo` have an upper clip of 1.2. Other inputs and
    hyperparameters: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token, aggregation, shown | more)


@policy_loss(allowed={"max_completion_length": at_least(1)})
def dr_grpo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    max_completion_length: int,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-sum",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A), summed over each response / a constant length; the mean over responses.

    Dr. GRPO, "GRPO done right" (arXiv:2503.20783): the weight of a response does not depend on its length. An advantage
    is the reward minus the mean of the group, not divided by the standard deviation. verl's seq-mean-token-sum-norm
    divides by the width of the batch, and ignores responses without a token in the mean. Other inputs and
    hyperparameters: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    return policy.output(per_token / max_completion_length, aggregation, shown | more)


@policy_loss(coupling="batch", allowed={"responses_per_prompt": at_least(1)})
def grpo_prompt_mean(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    responses_per_prompt: int,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A), the mean over the tokens of each prompt's responses, then over prompts.

    SkyRL's prompt_mean. The responses of a prompt are consecutive rows, and one sequence for the aggregation. Other
    inputs and hyperparameters: as for grpo. Raises BadData if the number of rows is not a multiple of
    responses_per_prompt.
    """
    rows = len(attention_mask)
    if rows % responses_per_prompt:
        raise BadData(
            f"grpo_prompt_mean got {rows} rows, not a multiple of responses_per_prompt={responses_per_prompt}: "
            "send all responses of a prompt as consecutive rows"
        )
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    prompts = (rows // responses_per_prompt, -1)
    total = aggregate(per_token.reshape(prompts), policy.mask.reshape(prompts), aggregation)
    return LossFnOutput(total, policy.logprobs, shown | more)


@policy_loss(
    inputs=("target_tokens", "logprobs", "advantages", "ref_logprobs"),
    finite=("logprobs", "advantages", "weights", "rollout_logprobs", "ref_logprobs"),
)
def grpo_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.04,
    ratio_weighted_kl: bool = False,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A) + beta * k3(policy, reference), averaged as grpo (arXiv:2402.03300, eq. 3).

    ref_logprobs: `[B, T]`; the server computes them if they are not sent. ratio_weighted_kl: k3 times the ratio, so
    that its mean over sampled tokens is an estimate for the current policy (DeepSeek-V3.2, arXiv:2512.02556; TRL's
    use_bias_correction_kl). A correction does not change the KL term. Other inputs and hyperparameters: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    divergence = k3(counted(policy.logprobs - loss_fn_inputs["ref_logprobs"], policy.mask))  # [B, T]
    more["ref_kl:mean"] = masked_mean(divergence, policy.mask)
    if ratio_weighted_kl:
        divergence = divergence * policy.log_ratio.exp()
    return policy.output(per_token + beta * divergence, aggregation, shown | more)


@policy_loss(coupling="batch", allowed={"top_entropy": SHARE})
def high_entropy_dapo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    top_entropy: float = 0.2,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.28,
    dual_clip: float | None = None,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "token-mean",
) -> LossFnOutput:
    """-min(ratio * A, clip(ratio) * A) on the tokens of highest entropy only, 0 on the others (arXiv:2506.01939).

    top_entropy: the share of the tokens of the batch that train. A mean divides by the number of all tokens, as with
    TRL's top_entropy_quantile. Other inputs and hyperparameters: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    per_token, shown = clipped(policy, policy.log_ratio.exp(), clip_low_threshold, clip_high_threshold, dual_clip)
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    with torch.no_grad():
        entropies = entropy(model_outputs, where=policy.mask)  # [B, T]
        kept = entropies[policy.mask != 0]  # [n]
        threshold = kept.float().quantile(1 - top_entropy) if len(kept) else 0.0
    more["entropy:mean"] = masked_mean(entropies, policy.mask)
    per_token = torch.where(entropies >= threshold, per_token, 0.0)
    return policy.output(per_token, aggregation, shown | more)
