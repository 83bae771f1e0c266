"""Logits on both sides of the wall: the source behind what a loss was given, and what a worker gives instead."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core.logits import Logits, LogitsSource
from tinkerbell_server.sandbox.logits_client import RemoteSource
from tinkerbell_server.sandbox.logits_server import StoredSource

_NAMES = 64  # operations that are told of, and characters of each


def source_of(model_outputs: Tensor) -> LogitsSource:
    """What answers questions about these logits `[B, T, V]`."""
    if isinstance(model_outputs, Logits):
        return model_outputs.origin.source
    hidden = getattr(model_outputs, "hidden_states", None)
    return StoredSource(model_outputs.flatten(0, 1), hidden.flatten(0, 1) if isinstance(hidden, Tensor) else None)


def budget_of(model_outputs: Tensor) -> int | None:
    """Bytes of logits that may be stored for a loss; None where no limit is known."""
    return model_outputs.origin.budget if isinstance(model_outputs, Logits) else None


def record(model_outputs: Tensor, materialised: list[tuple[str, int]]) -> None:
    """Let the engine's logits know what a worker has had stored of them."""
    if isinstance(model_outputs, Logits):
        model_outputs.materialised.extend(
            (name[:_NAMES], size) for name, size in materialised[:_NAMES] if name.isprintable() and 0 <= size < 1 << 50
        )


def logits_over(source: RemoteSource, shape: tuple[int, int], plain: bool, budget: int | None) -> Tensor:
    """Logits `[B, T, V]` for the loss: lazy, or the rows themselves."""
    if not plain:
        return Logits.over(source, shape, budget)
    rows = torch.arange(source.count)
    logits = source.full(rows).reshape(*shape, source.vocab)
    # as plain_logits does; asked for always, since an attribute cannot be looked up when it is needed
    logits.hidden_states = source.hidden(rows).reshape(*shape, -1)  # type: ignore[attr-defined]
    return logits


def materialised(logits: Tensor) -> list[tuple[str, int]]:
    """What had to be stored, by operation."""
    return list(logits.materialised) if isinstance(logits, Logits) else []
