"""Tokens drawn from logits: temperature, top-k, top-p, and one random number a row. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_AHEAD = 64


@dataclass(slots=True)
class Uniforms:
    """A row's own random numbers, the same whatever is drawn beside it and however many are asked for at a time."""

    seed: int
    _generator: torch.Generator = field(init=False)
    _left: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed % 2**63)

    def take(self) -> float:
        if not self._left:
            self._left = torch.rand(_AHEAD, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._left.pop()


@dataclass(frozen=True, slots=True)
class Settings:
    """How a row is drawn. temperature 0: its likeliest token; top_k below 1 and top_p 1: from all."""

    temperature: float
    top_k: int
    top_p: float


def choose(logits: Tensor, settings: Sequence[Settings], uniforms: Sequence[float]) -> Tensor:
    """A token for each row of logits `[S, V]`, int64 `[S]`; uniforms: a number in [0, 1) for each."""
    greedy = logits.argmax(-1)  # [S]
    warm = [index for index, one in enumerate(settings) if one.temperature > 0]
    if not warm:
        return greedy
    rows = torch.tensor(warm, device=logits.device)
    temperatures = torch.tensor([settings[index].temperature for index in warm], device=logits.device)
    scaled = logits[rows] / temperatures[:, None].to(logits.dtype)  # [W, V]
    for limits in {(settings[index].top_k, settings[index].top_p) for index in warm}:
        same = [place for place, index in enumerate(warm) if (settings[index].top_k, settings[index].top_p) == limits]
        if limits != (-1, 1.0):
            scaled[same] = _filtered(scaled[same], *limits)
    cumulative = scaled.double().softmax(-1).cumsum(-1)  # [W, V]
    at = torch.tensor([uniforms[index] for index in warm], dtype=torch.float64, device=logits.device)[:, None]
    # the last number is 1 up to rounding; a token of no weight adds nothing and so is never the first above
    found = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)[:, 0]  # [W]
    chosen = greedy.clone()
    chosen[rows] = found.clamp(max=logits.shape[-1] - 1)
    return chosen


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf where top_k, then top_p, leave a token out; the likeliest always stays."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # [S, 1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)  # [S, V]
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits
