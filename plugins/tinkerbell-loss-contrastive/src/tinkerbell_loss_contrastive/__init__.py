"""Contrastive losses on hidden states, which train a language model to produce embeddings."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_contrastive.info_nce import info_nce, info_nce_hard

__all__ = ["info_nce", "info_nce_hard", "register_losses"]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [info_nce, info_nce_hard]
