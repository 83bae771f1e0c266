"""Logits on both sides of the wall: the source behind what a loss was given, and what a worker gives its loss instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinkerbell_core.logits import LogitsSource
from tinkerbell_server.sandbox.answers import StoredSource
from tinkerbell_server.sandbox.remote import RemoteSource

Materialised = Callable[[], list[tuple[str, int]]]


def source_of(model_outputs: Tensor) -> LogitsSource:
    """What answers questions about these logits `[B, T, V]`."""
    hidden = getattr(model_outputs, "hidden_states", None)
    return StoredSource(model_outputs.flatten(0, 1), hidden.flatten(0, 1) if isinstance(hidden, Tensor) else None)


def budget_of(model_outputs: Tensor) -> int | None:
    """Bytes of logits that may be materialised; None where they are stored already."""
    return model_outputs.nbytes


def logits_over(
    source: RemoteSource, shape: tuple[int, int], plain: bool, budget: int | None
) -> tuple[Tensor, Materialised]:
    """Logits `[B, T, V]`, and a function that says which operations have materialised them."""
    rows = torch.arange(source.count)
    logits = source.full(rows).reshape(*shape, source.vocab)
    return logits, lambda: []


def needs_plain(error: BaseException) -> bool:
    """Whether a loss failed only because its logits were lazy."""
    return False
