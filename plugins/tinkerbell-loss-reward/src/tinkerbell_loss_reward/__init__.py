"""Losses of scores: reward models from preferences, process reward models, and the values of a critic."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_reward.bradley_terry import bradley_terry
from tinkerbell_loss_reward.process import prm, prm_tokens
from tinkerbell_loss_reward.value import mse, value_clip

__all__ = ["bradley_terry", "mse", "prm", "prm_tokens", "register_losses", "value_clip"]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [bradley_terry, prm, prm_tokens, value_clip, mse]
