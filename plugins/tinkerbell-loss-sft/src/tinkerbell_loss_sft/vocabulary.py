"""Losses that depend on the logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import (
    aggregate,
    counted_rows,
    effective_mask,
    logsumexp,
    masked_mean,
    spread_rows,
    target_logprobs,
)
from tinkerbell_core.hyperparameters import SHARE, above


@loss(
    coupling="sequence",
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    finite=("weights",),
    allowed={"epsilon": SHARE},
)
def label_smoothing(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    epsilon: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-(1 - epsilon) * log p(target) - epsilon * the mean of log p over the vocabulary, summed (arXiv:1512.00567).

    Cross-entropy with a target that has a share epsilon of its mass spread evenly over the vocabulary. target_tokens
    and weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    evenly = spread_rows(counted_rows(model_outputs, mask).log_softmax(-1).mean(-1), mask)  # [B, T]
    per_token = -(1 - epsilon) * logprobs - epsilon * evenly
    diagnostics = {"nll:mean": masked_mean(-logprobs, mask), "even_nll:mean": masked_mean(-evenly, mask)}
    return LossFnOutput(aggregate(per_token, mask, aggregation), logprobs, diagnostics)


@loss(
    coupling="sequence",
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    finite=("weights",),
    allowed={"cap": above(0)},
)
def softcap(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    cap: float = 30.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log p(target) under logits cap * tanh(logits / cap), summed: cross-entropy with soft-capped logits (2408.00118).

    Use it if the model is sampled with the same cap. For a model that caps its own logits, use cross_entropy.
    target_tokens and weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    capped = cap * (counted_rows(model_outputs, mask) / cap).tanh()  # [n, V]
    targets = counted_rows(loss_fn_inputs["target_tokens"], mask)  # [n]
    logprobs = spread_rows(target_logprobs(capped, targets), mask)  # [B, T]
    return LossFnOutput(aggregate(-logprobs, mask, aggregation), logprobs, {"nll:mean": masked_mean(-logprobs, mask)})


@loss(coupling="sequence", inputs=(), optional_inputs=("weights",), finite=("weights",))
def z_loss(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """logsumexp(logits)^2 at each position, summed: z-loss, a penalty of large logits (arXiv:2204.02311).

    Add it to another loss; the paper's weight is 1e-4. Liger calls the weight lse_square_scale. weights: `[B, T]`.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    log_z = logsumexp(model_outputs, where=mask)  # [B, T]
    diagnostics = {"log_z:mean": masked_mean(log_z, mask)}
    return LossFnOutput(aggregate(log_z.square(), mask, aggregation), diagnostics=diagnostics)
