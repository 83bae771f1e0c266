"""Unlearning losses: make some rows unlikely and keep other rows likely."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_unlearn.unlearn import gradient_ascent, npo, simnpo

__all__ = ["gradient_ascent", "npo", "register_losses", "simnpo"]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [gradient_ascent, npo, simnpo]
