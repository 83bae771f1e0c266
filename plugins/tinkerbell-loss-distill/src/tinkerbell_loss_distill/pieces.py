"""Shared parts of the losses: log-probabilities of teacher and student, and divergences between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import aggregate, counted_rows, effective_mask, masked_mean, spread_rows

Diagnostics = dict[str, Tensor]


class Rows(NamedTuple):
    """Log-probabilities of student and teacher at the n counted positions, `[n, V]` or `[n, K]`. mask: `[B, T]`.

    Those of the student are attached to the graph; those of the teacher may be -inf.
    """

    mask: Tensor
    student: Tensor
    teacher: Tensor


def whole_vocabulary(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, temperature: float = 1.0
) -> Rows:
    """Log-probabilities over the vocabulary; both sets of logits are divided by the temperature."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    student = counted_rows(model_outputs, mask)
    teacher = counted_rows(loss_fn_inputs["teacher_logits"], mask)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return Rows(mask, student.log_softmax(-1), teacher.log_softmax(-1))


def finite(logprobs: Tensor) -> Tensor:
    """Replaces -inf with the lowest finite number, so that 0 * log 0 is 0."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, `[n]`. log_p must be finite. For a log_q of -inf it is inf, or NaN if p is 0."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy of each row, `[n]`."""
    return -(log_p.exp() * finite(log_p)).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta * KL(T || M) + (1 - beta) * KL(S || M) of each row, M = beta * T + (1 - beta) * S: `[n]`.

    For beta 0 and 1 this formula is 0. The result is then the limit of the formula divided by beta or by 1 - beta:
    KL(T || S) for beta 0, KL(S || T) for beta 1.
    """
    if beta == 0:
        return kl(finite(teacher), student)
    if beta == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(finite(teacher), mixture) + (1 - beta) * kl(student, mixture)


def renormalised(logprobs: Tensor) -> Tensor:
    """Log-probabilities given that the token is one of these."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def with_tail(logprobs: Tensor) -> Tensor:
    """`[n, K + 1]`: the last column is the log-probability of the rest of the vocabulary."""
    mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-torch.expm1(mass)).log()], -1)


def output(per_row: Tensor, mask: Tensor, aggregation: str, diagnostics: Mapping[str, Tensor]) -> LossFnOutput:
    """The loss of divergences `[n]`; the diagnostics are also `[n]`."""
    per_token = spread_rows(per_row, mask)  # [B, T]
    shown = {f"{name}:mean": masked_mean(spread_rows(x.detach(), mask), mask) for name, x in diagnostics.items()}
    shown["divergence:mean"] = masked_mean(per_token, mask)
    return LossFnOutput(aggregate(per_token, mask, aggregation), diagnostics=shown)
