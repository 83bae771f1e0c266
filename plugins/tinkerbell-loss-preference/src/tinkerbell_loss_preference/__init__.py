"""Preference losses without a reference model."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_preference.cpo import cpo, cpo_hinge, cpo_ipo
from tinkerbell_loss_preference.orpo import orpo
from tinkerbell_loss_preference.simpo import alphapo, simpo
from tinkerbell_loss_preference.tpo import tpo, tpo_l

__all__ = ["alphapo", "cpo", "cpo_hinge", "cpo_ipo", "orpo", "register_losses", "simpo", "tpo", "tpo_l"]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [orpo, cpo, cpo_hinge, cpo_ipo, simpo, alphapo, tpo, tpo_l]
