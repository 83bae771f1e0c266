"""Losses of single judged completions: each is liked or disliked, and there are no pairs."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_kto.kto import kto
from tinkerbell_loss_kto.unpaired import apo_zero_unpaired, bco

__all__ = ["apo_zero_unpaired", "bco", "kto", "register_losses"]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [kto, apo_zero_unpaired, bco]
