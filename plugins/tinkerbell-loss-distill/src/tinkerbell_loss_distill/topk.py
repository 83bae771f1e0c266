"""Divergences on K tokens per position. The names of the losses state how they treat the other tokens.

partial: the other tokens are ignored, and the divergence can be negative. renormalised: both distributions are
conditioned on the K tokens. tail: the other tokens count as one token, and the result is at most the divergence over
the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import counted_rows, effective_mask, logsumexp, target_logprobs
from tinkerbell_core.hyperparameters import SHARE, at_least
from tinkerbell_loss_distill.pieces import Rows, finite, jensen_shannon, kl, output, renormalised, with_tail
from tinkerbell_loss_distill.vocabulary import distillation

of_teacher = family(
    coupling="sequence",
    inputs=("teacher_topk_ids", "teacher_topk_logprobs"),
    optional_inputs=("weights",),
    finite=("weights",),
)
"""Declares a loss on the teacher's top tokens."""

of_student = partial(distillation, allowed={"k": at_least(1), "beta": SHARE})
"""Declares a loss on the student's top tokens."""


def _teachers_top(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor
) -> tuple[Rows, dict[str, Tensor]]:
    """Log-probabilities of the teacher's K tokens, `[n, K]`, and their mass under student and teacher, `[n]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    student = target_logprobs(model_outputs, loss_fn_inputs["teacher_topk_ids"], where=mask)  # [B, T, K]
    teacher = loss_fn_inputs["teacher_topk_logprobs"]  # [B, T, K]
    return _watched(Rows(mask, counted_rows(student, mask), counted_rows(teacher, mask)))


def _students_top(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, k: int
) -> tuple[Rows, dict[str, Tensor]]:
    """Log-probabilities of the student's k likeliest tokens, `[n, k]`, and their mass under both, `[n]`."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logits = counted_rows(model_outputs, mask)  # [n, V]
    theirs = counted_rows(loss_fn_inputs["teacher_logits"], mask).log_softmax(-1)  # [n, V]
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)  # [n, k]
    student = values - logsumexp(logits)[..., None]
    return _watched(Rows(mask, student, theirs.gather(-1, ids)))


def _watched(rows: Rows) -> tuple[Rows, dict[str, Tensor]]:
    masses = {"student_mass": rows.student.detach().exp().sum(-1), "teacher_mass": rows.teacher.exp().sum(-1)}
    return rows, masses


@of_teacher()
def teacher_topk_partial_kl(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """Sum over the teacher's top K of p_teacher * (log p_teacher - log p), not renormalised; summed.

    Forward KL without the other tokens, verl's forward_kl_topk. It can be negative if the student has more mass on the
    K tokens than the teacher. The trainer of verl clamps each position to at least 0. teacher_topk_ids,
    teacher_topk_logprobs: `[B, T, K]`.
    """
    rows, masses = _teachers_top(model_outputs, loss_fn_inputs, attention_mask)
    return output(kl(finite(rows.teacher), rows.student), rows.mask, aggregation, masses)


@of_teacher(allowed={"beta": SHARE})
def teacher_topk_renormalised_jsd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """jsd between teacher and student given that the token is one of the teacher's top K, summed; twinkle's GKD top-k.

    It does not depend on the student's mass on the other tokens. beta 0 is forward KL. teacher_topk_ids,
    teacher_topk_logprobs: `[B, T, K]`.
    """
    rows, masses = _teachers_top(model_outputs, loss_fn_inputs, attention_mask)
    divergence = jensen_shannon(renormalised(rows.student), renormalised(rows.teacher), beta)
    return output(divergence, rows.mask, aggregation, masses)


@of_teacher(allowed={"beta": SHARE})
def teacher_topk_tail_jsd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """jsd over the teacher's top K and one more token for the rest of the vocabulary, summed.

    The recommended loss if the teacher returns only K log-probabilities. beta 0 is forward KL. teacher_topk_ids,
    teacher_topk_logprobs: `[B, T, K]`; a position must not have the same id twice.
    """
    rows, masses = _teachers_top(model_outputs, loss_fn_inputs, attention_mask)
    divergence = jensen_shannon(with_tail(rows.student), with_tail(rows.teacher), beta)
    return output(divergence, rows.mask, aggregation, masses)


@of_student()
def student_topk_renormalised_jsd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    aggregation: str = "sum",
) -> LossFnOutput:
    """jsd between student and teacher given that the token is one of the student's top k, summed; TRL's SDFT, no tail.

    teacher_logits: `[B, T, V]`. beta is TRL's distillation_alpha.
    """
    rows, masses = _students_top(model_outputs, loss_fn_inputs, attention_mask, k)
    divergence = jensen_shannon(renormalised(rows.student), renormalised(rows.teacher), beta)
    return output(divergence, rows.mask, aggregation, masses)


@of_student()
def student_topk_tail_jsd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    aggregation: str = "sum",
) -> LossFnOutput:
    """jsd over the student's top k and one more token for the rest, summed; TRL's SDFT with add_tail.

    teacher_logits: `[B, T, V]`. beta is TRL's distillation_alpha.
    """
    rows, masses = _students_top(model_outputs, loss_fn_inputs, attention_mask, k)
    divergence = jensen_shannon(with_tail(rows.student), with_tail(rows.teacher), beta)
    return output(divergence, rows.mask, aggregation, masses)
