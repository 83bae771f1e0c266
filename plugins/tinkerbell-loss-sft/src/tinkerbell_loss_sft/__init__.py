"""Supervised losses: alternatives and additions to cross-entropy."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_sft.likelihood import dft, focal
from tinkerbell_loss_sft.unlikelihood import unlikelihood
from tinkerbell_loss_sft.vocabulary import label_smoothing, softcap, z_loss

LOSSES: list[LossSpec] = [label_smoothing, softcap, z_loss, dft, focal, unlikelihood]

__all__ = ["LOSSES", "register_losses", *(spec.name for spec in LOSSES)]


@hookimpl
def register_losses() -> list[LossSpec]:
    return LOSSES
