"""Divergences from a teacher, computed from its logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.decorator import family
from tinkerbell_core.functional import counted_rows, effective_mask, target_logprobs
from tinkerbell_core.hyperparameters import SHARE, above
from tinkerbell_loss_distill.pieces import entropy_of, finite, jensen_shannon, kl, output, whole_vocabulary

distillation = family(
    coupling="sequence", inputs=("teacher_logits",), optional_inputs=("weights",), finite=("weights",)
)
"""Declares a divergence from teacher_logits."""


@distillation(allowed={"temperature": above(0)})
def forward_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """KL(teacher || student) at each position, summed: mode-covering distillation (arXiv:1503.02531).

    teacher_logits: `[B, T, V]`, may contain -inf. temperature divides the logits of both; the loss is not multiplied by
    its square. torchtune omits the entropy of the teacher, which is soft_cross_entropy.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    shown = {"teacher_entropy": entropy_of(rows.teacher)}
    return output(kl(finite(rows.teacher), rows.student), rows.mask, aggregation, shown)


@distillation(allowed={"temperature": above(0)})
def soft_cross_entropy(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-sum over the vocabulary of p_teacher * log p, summed: forward_kl plus the teacher's entropy, the same gradient.

    teacher_logits: `[B, T, V]`.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    shown = {"teacher_entropy": entropy_of(rows.teacher)}
    return output(-(rows.teacher.exp() * rows.student).sum(-1), rows.mask, aggregation, shown)


@distillation(allowed={"temperature": above(0)})
def reverse_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """KL(student || teacher) at each position, summed: mode-seeking distillation (arXiv:2306.08543).

    teacher_logits: `[B, T, V]`. If a logit of the teacher is -inf and that of the student is not, the divergence is
    infinite and the call is rejected.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    shown = {"teacher_entropy": entropy_of(rows.teacher), "student_entropy": entropy_of(rows.student.detach())}
    return output(kl(rows.student, rows.teacher), rows.mask, aggregation, shown)


@distillation(allowed={"alpha": SHARE, "temperature": above(0)})
def symmetric_kl(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """alpha * KL(teacher || student) + (1 - alpha) * KL(student || teacher) at each position, summed.

    teacher_logits: `[B, T, V]`. torchtune omits the entropy of the teacher in the first term.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    forward, reverse = kl(finite(rows.teacher), rows.student), kl(rows.student, rows.teacher)
    shown = {"forward_kl": forward, "reverse_kl": reverse}
    return output(alpha * forward + (1 - alpha) * reverse, rows.mask, aggregation, shown)


@distillation(allowed={"beta": SHARE, "temperature": above(0)})
def jsd(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """beta * KL(T || M) + (1 - beta) * KL(S || M), M = beta * T + (1 - beta) * S, summed (GKD, arXiv:2306.13649).

    T is the teacher, S the student. beta 0 is forward_kl, beta 1 is reverse_kl. teacher_logits: `[B, T, V]`, may
    contain -inf. On samples from the student, it is on-policy distillation over the whole vocabulary.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    shown = {"teacher_entropy": entropy_of(rows.teacher)}
    return output(jensen_shannon(rows.student, rows.teacher, beta), rows.mask, aggregation, shown)


@distillation(
    inputs=("target_tokens", "logprobs", "teacher_logits"),
    finite=("logprobs", "weights"),
    allowed={"beta": SHARE},
)
def sdft(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.5,
    ratio_cap: float = 2.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """jsd to the model with a demonstration, times min(ratio of the sampled token, ratio_cap), detached; summed.

    Self-distillation fine-tuning. target_tokens: tokens sampled from the student. logprobs: `[B, T]`, their
    log-probabilities at the time of sampling. teacher_logits: `[B, T, V]`, of the same model with the demonstration in
    its prompt. beta is TRL's distillation_alpha: 0 is forward KL, 1 reverse KL. For samples from the current policy,
    the ratios are 1 and it is jsd.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=rows.mask)  # [B, T]
    drift = counted_rows(logprobs.detach() - loss_fn_inputs["logprobs"], rows.mask)  # [n]
    ratio = drift.clamp(-20, 20).exp().clamp(max=ratio_cap)
    divergence = jensen_shannon(rows.student, rows.teacher, beta)  # [n]
    found = output(divergence * ratio, rows.mask, aggregation, {"ratio": ratio, "kl": -drift})
    return LossFnOutput(found.loss, logprobs, found.diagnostics)


@distillation(allowed={"temperature": above(0)})
def total_variation(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """Half the sum over the vocabulary of |p_teacher - p| at each position, summed (arXiv:2307.15190).

    teacher_logits: `[B, T, V]`.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask, temperature)
    return output((rows.teacher.exp() - rows.student.exp()).abs().sum(-1) / 2, rows.mask, aggregation, {})


@distillation(finite=("weights", "teacher_logits"))
def cosine_distance(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """1 - cosine similarity of the logits of teacher and student at each position, summed; as in Liger.

    teacher_logits: `[B, T, V]`, finite.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)
    student = counted_rows(model_outputs, mask)
    teacher = counted_rows(loss_fn_inputs["teacher_logits"], mask)
    return output(1 - F.cosine_similarity(student, teacher, dim=-1), mask, aggregation, {})


@distillation()
def uld(
    model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, aggregation: str = "sum"
) -> LossFnOutput:
    """Sum of |teacher - student| over probabilities sorted by size, summed: for a teacher of another vocabulary.

    Universal logit distillation (arXiv:2402.12030). teacher_logits: `[B, T, V']`. The caller aligns the positions of
    teacher and student.
    """
    rows = whole_vocabulary(model_outputs, loss_fn_inputs, attention_mask)
    student, teacher = (x.exp().sort(-1, descending=True).values for x in (rows.student, rows.teacher))
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(x, (0, width - x.shape[-1])) for x in (student, teacher))
    return output((student - teacher).abs().sum(-1), rows.mask, aggregation, {})
