"""Losses that make the rows to forget unlikely, and keep the rows to retain likely."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import (
    aggregate,
    aggregate_sequences,
    effective_mask,
    masked_mean,
    per_sequence,
    sequence_log_ratio,
    sequence_mean,
    sequence_nll,
    target_logprobs,
)
from tinkerbell_core.hyperparameters import above

Inputs = Mapping[str, Tensor]


@loss(coupling="sequence", inputs=("target_tokens",), optional_inputs=("weights", "retain"), finite=("weights",))
def gradient_ascent(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    retain_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """log p(target), and retain_weight * -log p(target) on rows to retain: gradient ascent (arXiv:2210.01504).

    With rows to retain, it is also called gradient difference. The loss has no lower bound, and long training destroys
    the model. retain: `[B]`, 1 for rows to retain, default 0.
    """
    mask, logprobs, retain = _read(model_outputs, loss_fn_inputs, attention_mask)
    per_token = torch.where(retain[:, None], -retain_weight * logprobs, logprobs)  # [B, T]
    return LossFnOutput(aggregate(per_token, mask, aggregation), logprobs, _shown(logprobs, mask, retain))


@loss(
    coupling="sequence",
    inputs=("target_tokens", "ref_logprobs"),
    optional_inputs=("weights", "retain"),
    finite=("ref_logprobs", "weights"),
    allowed={"beta": above(0)},
)
def npo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-2 / beta * log sigmoid(-beta * log-ratio to the reference): negative preference optimisation (arXiv:2404.05868).

    DPO with only the rejected term. The loss of a row is at least 0, so it has a lower bound, unlike gradient_ascent.
    retain: `[B]`, 1 for rows to retain, default 0; retain_weight times the mean NLL of their tokens is added.
    """
    mask, logprobs, retain = _read(model_outputs, loss_fn_inputs, attention_mask)
    log_ratio = sequence_log_ratio(logprobs, loss_fn_inputs["ref_logprobs"], mask)  # [B]
    per_row = -2 / beta * F.logsigmoid(-beta * log_ratio)
    shown = {"forget_log_ratio": masked_mean(log_ratio[:, None], (~retain & (mask != 0).any(-1))[:, None])}
    return _output(per_row, mask, logprobs, retain, retain_weight, aggregation, shown)


@loss(
    coupling="sequence",
    inputs=("target_tokens",),
    optional_inputs=("weights", "retain"),
    finite=("weights",),
    allowed={"beta": above(0)},
)
def simnpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 2.5,
    gamma: float = 0.0,
    retain_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-2 / beta * log sigmoid(-beta * mean log p(target) - gamma): NPO without a reference, SimNPO (arXiv:2410.07163).

    retain: `[B]`, 1 for rows to retain, default 0; retain_weight times the mean NLL of their tokens is added.
    """
    mask, logprobs, retain = _read(model_outputs, loss_fn_inputs, attention_mask)
    per_row = -2 / beta * F.logsigmoid(-beta * sequence_mean(logprobs, mask) - gamma)  # [B]
    return _output(per_row, mask, logprobs, retain, retain_weight, aggregation, {})


def _read(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask and the target log-probabilities, `[B, T]`, and whether to retain each row, `[B]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    retain = loss_fn_inputs.get("retain")
    if retain is None:
        return mask, logprobs, torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    return mask, logprobs, per_sequence("retain", retain, mask) > 0.5


def _output(
    per_row: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    retain: Tensor,
    retain_weight: float,
    aggregation: str,
    shown: Mapping[str, Tensor],
) -> LossFnOutput:
    forget = aggregate_sequences(per_row, (mask != 0).any(-1) & ~retain, aggregation)
    kept = sequence_nll(logprobs, mask * retain[:, None], aggregation)
    return LossFnOutput(forget + retain_weight * kept, logprobs, {**_shown(logprobs, mask, retain), **shown})


def _shown(logprobs: Tensor, mask: Tensor, retain: Tensor) -> dict[str, Tensor]:
    return {
        "forget_nll": masked_mean(-logprobs, mask * ~retain[:, None]),
        "retain_nll": masked_mean(-logprobs, mask * retain[:, None]),
    }
