"""Distillation: divergences from a teacher on the whole vocabulary, on top tokens, or on sampled tokens."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_distill.sampled import iw_opd, on_policy_distillation, sampled_reverse_kl
from tinkerbell_loss_distill.topk import (
    student_topk_renormalised_jsd,
    student_topk_tail_jsd,
    teacher_topk_partial_kl,
    teacher_topk_renormalised_jsd,
    teacher_topk_tail_jsd,
)
from tinkerbell_loss_distill.vocabulary import (
    cosine_distance,
    forward_kl,
    jsd,
    reverse_kl,
    sdft,
    soft_cross_entropy,
    symmetric_kl,
    total_variation,
    uld,
)

LOSSES: list[LossSpec] = [
    forward_kl,
    reverse_kl,
    symmetric_kl,
    jsd,
    soft_cross_entropy,
    total_variation,
    cosine_distance,
    uld,
    teacher_topk_partial_kl,
    teacher_topk_renormalised_jsd,
    teacher_topk_tail_jsd,
    student_topk_renormalised_jsd,
    student_topk_tail_jsd,
    on_policy_distillation,
    sampled_reverse_kl,
    iw_opd,
    sdft,
]

__all__ = ["LOSSES", "register_losses", *(spec.name for spec in LOSSES)]


@hookimpl
def register_losses() -> list[LossSpec]:
    return LOSSES
