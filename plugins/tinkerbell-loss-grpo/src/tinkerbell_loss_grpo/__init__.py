"""GRPO and related policy losses: reinforcement learning from groups of samples."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_grpo.clipped import bnpo, dapo, dr_grpo, grpo, grpo_kl, grpo_prompt_mean, high_entropy_dapo
from tinkerbell_loss_grpo.covariance import clip_cov, kl_cov
from tinkerbell_loss_grpo.divergence import dppo_kl, dppo_kl_truncated, dppo_tv, dppo_tv_truncated
from tinkerbell_loss_grpo.gradient import a2po, reinforce, rollout_is
from tinkerbell_loss_grpo.penalties import entropy_bonus, kl_abs, kl_k1, kl_k2, kl_k3
from tinkerbell_loss_grpo.sequence import gmpo, gspo, luspo, rloo_ppo, vespo
from tinkerbell_loss_grpo.soft import sapo

LOSSES: list[LossSpec] = [
    grpo,
    bnpo,
    dapo,
    dr_grpo,
    grpo_prompt_mean,
    grpo_kl,
    high_entropy_dapo,
    gspo,
    luspo,
    rloo_ppo,
    gmpo,
    vespo,
    sapo,
    reinforce,
    rollout_is,
    a2po,
    dppo_tv,
    dppo_kl,
    dppo_tv_truncated,
    dppo_kl_truncated,
    clip_cov,
    kl_cov,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_abs,
    entropy_bonus,
]

__all__ = ["LOSSES", "register_losses", *(spec.name for spec in LOSSES)]


@hookimpl
def register_losses() -> list[LossSpec]:
    return LOSSES
